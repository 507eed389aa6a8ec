"""Draws a sheet of the generated set: ``python -m chatpose_jax.data.synthetic.preview OUT.png``."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap

import numpy as np
from PIL import Image, ImageDraw

from chatpose_jax.data.synthetic.captions import caption
from chatpose_jax.data.synthetic.dataset import to_camera
from chatpose_jax.data.synthetic.families import POSTURES, sample_poses
from chatpose_jax.data.synthetic.posecodes import encode
from chatpose_jax.data.synthetic.scene import Studio, draw_scene
from smpl_jax import render

_PANEL, _TEXT = 150, 110  # pixels


def posture_sheet(per_family: int = 2, seed: int = 0, columns: int = 6) -> np.ndarray:
    """A sheet (H, W, 3) uint8 of poses of every posture, from the front and the side, with their captions."""
    rng = np.random.default_rng(seed)
    studio = Studio()
    panels = []
    for number, family in enumerate(POSTURES):
        poses = sample_poses(per_family, [seed, number], family=family)
        codes = encode(poses.rotations, rng)
        for row, rotations in enumerate(poses.rotations):
            scene = dataclasses.replace(draw_scene(rng), background="flat", colors=np.full((2, 3), 0.93), pitch=5.0)
            views = [studio.render(to_camera(rotations, yaw, scene.pitch), scene, _PANEL) for yaw in (0.0, 55.0)]
            panel = Image.new("RGB", (2 * _PANEL + 4, _PANEL + _TEXT), "white")
            panel.paste(Image.fromarray(np.concatenate(views, 1)), (0, 0))
            text = textwrap.fill(caption(codes, row, rng, "detailed", family), 50)
            ImageDraw.Draw(panel).text((2, _PANEL + 4), text, fill="black")
            panels.append(np.asarray(panel))
    return render.contact_sheet(panels, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="PNG to write")
    parser.add_argument("--per-family", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(render.save_png(arguments.out, posture_sheet(arguments.per_family, arguments.seed)))


if __name__ == "__main__":
    main()
