"""Motion capture: BVH and ASF/AMC files to clips, clips to SMPL poses. Each format has a module; ``retarget`` depends on none of them."""

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
"""Suffixes of motion files."""


def read_clip(path: str | os.PathLike[str]) -> Clip:
    """Reads a ``.bvh``, or an ``.amc`` with its skeleton ``.asf`` beside it; the suffix decides.

    Raises:
        PoseFileError: another suffix, or any error of the format's reader.
    """
    reader = READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise PoseFileError(f"{path}: expected a motion file that ends in {' or '.join(SUFFIXES)}")
    return reader(path)
