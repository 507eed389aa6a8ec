"""Draws a body with characters, so that the terminal can show the pose of an answer."""

from __future__ import annotations

import os
import shutil
from typing import TextIO

import numpy as np

from smpl_jax.pose import for_body
from smpl_jax.posed import PosedBody

WIDTH, ROWS = 36, 20
"""Size of one view: columns, and lines of two pixels each."""
_FINE = 4  # samples along each axis of a pixel
_KEY = np.array([255, 0, 255], np.uint8)  # no part of a body has this colour


def can_draw(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows block characters."""
    encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
    return stream.isatty() and os.environ.get("TERM") != "dumb" and encoding == "utf8"


def drawing(pose: PosedBody, columns: int | None = None, colours: bool | None = None) -> str:
    """A pose as lines of half blocks: as the camera sees it and, if there are enough ``columns``, at an angle of three quarters. "" if too few.

    columns: width of the terminal, by default the real one. colours: use 256 colours; by default True unless NO_COLOR is set.
    """
    from smpl_jax.render import render_body

    columns = shutil.get_terminal_size().columns if columns is None else columns
    colours = not os.environ.get("NO_COLOR") if colours is None else colours
    views = ("front", "three_quarter")[: columns // WIDTH]
    if not views:
        return ""
    size = (2 * ROWS * _FINE, WIDTH * _FINE)
    fitted = for_body(pose.pose, pose.body)
    image = render_body(
        pose.body,
        fitted["rotations"],
        fitted["betas"],
        size=size,
        views=views,
        frame=pose.pose.frame,
        background=_KEY,
        supersample=1,
        ground=False,
    )
    blocks = image.reshape(2 * ROWS, _FINE, -1, _FINE, 3).swapaxes(1, 2).reshape(2 * ROWS, -1, _FINE**2, 3)
    drawn = (blocks != _KEY).any(-1)
    count = drawn.sum(-1)
    pixels = (blocks * drawn[..., None]).sum(-2) / np.maximum(count, 1)[..., None]
    filled = count >= 0.4 * _FINE**2
    codes = 16 + np.rint(pixels / 51).astype(int) @ [36, 6, 1]  # the 6 × 6 × 6 cube of 256 colours
    lines = []
    for row in range(0, 2 * ROWS, 2):
        cells = zip(filled[row], filled[row + 1], codes[row], codes[row + 1])
        lines.append("".join(_cell(*cell, colours) for cell in cells).rstrip())
    while lines and not lines[0]:
        lines.pop(0)
    return "\n".join(lines).rstrip()


def _cell(top: bool, bottom: bool, above: int, below: int, colours: bool) -> str:
    if not top and not bottom:
        return " "
    block = "█" if top and bottom and not colours else "▀" if top else "▄"
    if not colours:
        return block
    ground = f";48;5;{below}" if top and bottom else ""
    return f"\x1b[38;5;{above if top else below}{ground}m{block}\x1b[0m"
