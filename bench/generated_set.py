"""How well a description of the generated set determines its pose: the table of docs/data.md.

    JAX_PLATFORMS=cpu python bench/generated_set.py

Models in closed form (``evaluation.systems.simple``) learn from training descriptions and are asked the validation split's.
"""

from __future__ import annotations

import argparse
import re

import numpy as np

from chatpose_jax.data.questions import caption_in
from chatpose_jax.data.synthetic import skeleton
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.evaluation.systems.simple import MODELS
from smpl_jax import metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-size", type=int, default=4000)
    parser.add_argument("--val-size", type=int, default=400)
    arguments = parser.parse_args()
    train = SyntheticDataset("train", arguments.train_size, tasks={"text": 1})[:]
    val = SyntheticDataset("val", arguments.val_size, tasks={"text": 1})[:]
    learnt, asked = ([caption_in(row.messages[0]["content"]) for row in rows] for rows in (train, val))
    words = [re.findall(r"[a-z0-9]+", text.lower()) for text in learnt + asked]
    print(
        f"{len({w for each in words for w in each})} distinct words, {np.mean([len(each) for each in words]):.1f} in a description"
    )
    poses, targets = (np.stack([row.poses.rotations[0] for row in rows]) for rows in (train, val))
    truth, _ = skeleton.forward_kinematics(targets)
    for name, make in MODELS.items():
        joints, _ = skeleton.forward_kinematics(make(learnt, poses).answer(asked))
        errors = [float(np.mean(measure(joints, truth))) for measure in (metrics.mpjpe, metrics.pa_mpjpe)]
        print(f"{name:8} MPJPE {errors[0]:.1f} mm, PA-MPJPE {errors[1]:.1f} mm")


if __name__ == "__main__":
    main()
