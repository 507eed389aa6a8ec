"""Motion capture: BVH and ASF/AMC files to clips, clips to SMPL poses. One file a format; ``retarget`` knows none of them."""

from __future__ import annotations

import os
from pathlib import Path

from smpl_jax.errors import PoseFileError
from smpl_jax.mocap.acclaim import read_amc
from smpl_jax.mocap.bvh import read_bvh
from smpl_jax.mocap.clip import Clip
from smpl_jax.mocap.retarget import retarget

__all__ = ["SUFFIXES", "Clip", "read_amc", "read_bvh", "read_clip", "retarget"]

READERS = {".bvh": read_bvh, ".amc": read_amc}
SUFFIXES = tuple(READERS)
"""Suffixes of files that hold a motion."""


def read_clip(path: str | os.PathLike[str]) -> Clip:
    """Read a ``.bvh``, or an ``.amc`` with its skeleton ``.asf`` beside it, by its suffix.

    Raises:
        PoseFileError: another suffix, or what the format's reader raises.
    """
    reader = READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise PoseFileError(f"{path}: expected a file of motion capture, {' or '.join(SUFFIXES)}")
    return reader(path)
