"""Fits the pose prior of ``smpl_jax.fit`` to motion capture, and writes ``smpl_jax/fit/prior.npz``.

    python tools/pose_prior.py --clips FOLDER [--components 16] [--out smpl_jax/fit/prior.npz]

FOLDER holds CMU clips (ASF/AMC). Frames, about ``RATE`` a second, count once as they are and once mirrored. The clips show walking, running, jumping,
fighting and washing; so as many poses of the generated set (``GENERATED``) join them, which sit, kneel, bow and lie too. A mixture of Gaussians over
the axis-angles of the 21 joints after the root is fitted by expectation and maximisation, from k-means. All this knows little of what people do, so
every covariance is widened: see ``WIDEN`` and ``FLOOR``. Neither clips nor poses are part of the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from chatpose_jax.data.synthetic.families import sample_poses
from smpl_jax.mocap import read_clip, retarget
from smpl_jax.pose import SHARED, Pose, concatenate, mirror_pose
from smpl_jax.rotations import matrix_to_axis_angle

RATE = 15.0
"""Frames a second that count."""
GENERATED, SEED = 1600, 20261127
"""Poses of the generated set, each counted mirrored too, and the seed that draws them; the set itself draws with other seeds."""
FLOOR = 0.08
"""Radians: the smallest standard deviation of a joint's angle in any direction."""
WIDEN = 0.25
"""Radians: standard deviation that a component gets in the direction in which the joints of all clips vary most, and less in the others."""
SOURCE = (
    "Fitted to motion capture of the CMU Graphics Lab (clips {clips}), retargeted to SMPL's joints, and to poses of ChatPose-JAX's generated set. "
    "The data used in this project was obtained from mocap.cs.cmu.edu. The database was created with funding from NSF EIA-0196217. It is free for "
    "research and commercial use."
)


def angles(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Axis-angles (N, 63) of all clips and their mirror images, and the names of the clips."""
    files = sorted(folder.glob("*.amc"))
    poses: list[Pose] = []
    for file in files:
        clip = read_clip(file)
        step = max(1, round(clip.rate / RATE))
        pose = retarget(clip)[np.flatnonzero(clip.trusted)[::step]].replace(translation=None, measured=None)
        poses += [pose, mirror_pose(pose)]
    drawn = Pose(np.asarray(sample_poses(GENERATED, SEED).rotations, np.float32), "model")
    rotations = concatenate([*poses, drawn, mirror_pose(drawn)]).rotations[:, 1:SHARED]
    return np.asarray(matrix_to_axis_angle(rotations), np.float64).reshape(len(rotations), -1), [f.stem for f in files]


def fit(samples: np.ndarray, components: int, seed: int = 0, rounds: int = 60) -> dict[str, np.ndarray]:
    """Weights (K,), means (K, D) and covariances (K, D, D) of a mixture."""
    rng = np.random.default_rng(seed)
    means = _centres(samples, components, rng)
    nearest = ((samples[:, None] - means) ** 2).sum(-1).argmin(1)
    share = np.eye(components)[nearest]
    overall = np.cov(samples.T)
    size = len(overall)
    widening = FLOOR**2 * np.eye(size) + WIDEN**2 * overall / np.linalg.eigvalsh(overall)[-1]
    for _ in range(rounds):
        count = share.sum(0) + 1e-9
        means = share.T @ samples / count[:, None]
        apart = samples[:, None] - means
        covariances = np.einsum("nk,nki,nkj->kij", share, apart, apart, optimize=True) / count[:, None, None] + widening
        weights = count / count.sum()
        whiten = np.linalg.inv(np.linalg.cholesky(covariances))
        energies = 0.5 * (np.einsum("kij,nkj->nki", whiten, apart, optimize=True) ** 2).sum(-1)
        scores = np.log(weights) + np.log(np.einsum("kii->ki", whiten)).sum(-1) - energies
        share = np.exp(scores - scores.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
    order = np.argsort(-weights)
    return {"weights": weights[order], "means": means[order], "covars": covariances[order]}


def _centres(samples: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """k-means, from seeds that are far apart."""
    centres = samples[[rng.integers(len(samples))]]
    while len(centres) < count:
        distance = ((samples[:, None] - centres) ** 2).sum(-1).min(1)
        centres = np.concatenate([centres, samples[[rng.choice(len(samples), p=distance / distance.sum())]]])
    for _ in range(30):
        nearest = ((samples[:, None] - centres) ** 2).sum(-1).argmin(1)
        centres = np.stack(
            [samples[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(count)]
        )
    return centres


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("smpl_jax/fit/prior.npz"))
    args = parser.parse_args()
    samples, clips = angles(args.clips)
    mixture = {name: value.astype(np.float32) for name, value in fit(samples, args.components).items()}
    np.savez_compressed(args.out, **mixture, source=np.array(SOURCE.format(clips=", ".join(clips))))
    print(f"{args.out}: {args.components} components of {len(samples)} poses, {args.out.stat().st_size / 1e3:.0f} kB")
    print("weights", np.round(mixture["weights"], 3))


if __name__ == "__main__":
    main()
