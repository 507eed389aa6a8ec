"""A clip of motion capture: a skeleton with its joints' rotations over time, whatever the file format."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smpl_jax.errors import PoseFileError
from smpl_jax.printing import one_line

MAX_BYTES = 2**28
"""Maximum size of a motion file. A minute of motion takes about a megabyte."""
MAX_JOINTS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """T frames of a skeleton of J joints. At rest all rotations are the identity and the bones are ``offsets``.

    names: (J,), parents before children, joint 0 the root. Names of the tips of limbs end in `` end``.
    parents: (J,) int, -1 for the root.
    offsets: (J, 3) from the parent joint at rest, in the file's axes: metres if the format has a unit (ASF), else the file's unit.
    rotations: (T, J, 3, 3) relative to the parent.
    translation: (T, 3) position of the root, in the unit of ``offsets``.
    rate: frames per second.
    trusted: (T,) bool; False for frames that the file itself shows to be wrong: an inserted rest pose, or legs beyond the file's limits.
    """

    path: Path
    names: tuple[str, ...]
    parents: NDArray[np.int64]
    offsets: NDArray[np.float64]
    rotations: NDArray[np.float64]
    translation: NDArray[np.float64]
    rate: float
    trusted: NDArray[np.bool_]

    __repr__ = one_line

    def __len__(self) -> int:
        return len(self.rotations)

    @functools.cached_property
    def world(self) -> NDArray[np.float64]:
        """Rotations from rest (T, J, 3, 3), in the file's axes."""
        out = np.array(self.rotations)
        for joint, parent in enumerate(self.parents):
            if parent >= 0:
                out[:, joint] = out[:, parent] @ self.rotations[:, joint]
        return out

    @functools.cached_property
    def positions(self) -> NDArray[np.float64]:
        """Joint positions (T, J, 3), in the file's axes and the unit of ``offsets``."""
        out = np.zeros((*self.rotations.shape[:2], 3))
        out[:, 0] = self.translation
        for joint, parent in enumerate(self.parents):
            if parent >= 0:
                out[:, joint] = out[:, parent] + self.world[:, parent] @ self.offsets[joint]
        return out

    @functools.cached_property
    def rest(self) -> NDArray[np.float64]:
        """Joint positions at rest (J, 3), the root at the origin."""
        out = np.zeros_like(self.offsets)
        for joint, parent in enumerate(self.parents):
            if parent >= 0:
                out[joint] = out[parent] + self.offsets[joint]
        return out


def turn_about(axis: str, degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotations (..., 3, 3) about "x", "y" or "z" by angles (...) in degrees."""
    angle = np.deg2rad(np.asarray(degrees, float))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    out = np.zeros((*angle.shape, 3, 3))
    out[..., range(3), range(3)] = 1.0
    out[..., i, i] = out[..., j, j] = np.cos(angle)
    out[..., j, i] = np.sin(angle)
    out[..., i, j] = -out[..., j, i]
    return out


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a motion file. Raises PoseFileError if the file is missing, too large, or not text."""
    file = Path(path)
    try:
        if not file.is_file():
            raise PoseFileError(
                f"{file}: expected a motion file, found {'a folder' if file.is_dir() else 'no such file'}"
            )
        if (size := file.stat().st_size) > MAX_BYTES:
            raise PoseFileError(f"{file}: expected a motion file of at most {MAX_BYTES:,} bytes; found {size:,}")
        data = file.read_bytes()
    except OSError as error:
        raise PoseFileError(f"{file}: {error.strerror}") from error
    if b"\0" in data:
        raise PoseFileError(f"{file}: expected a text file, found binary data")
    return data.decode("utf-8", "replace")


def numbers(words: Sequence[str], where: str) -> NDArray[np.float64]:
    """Words as finite numbers (N,). Otherwise raises PoseFileError with ``where`` and the first bad word."""
    try:
        values = np.array(words, np.float64)
    except ValueError:
        values = np.full(1, np.nan)
    if not np.isfinite(values).all():
        wrong = next((word for word in words if not _finite(word)), "")
        raise PoseFileError(f"{where}: expected finite numbers, found {wrong!r:.60}")
    return values


def _finite(word: str) -> bool:
    try:
        return bool(np.isfinite(float(word)))
    except ValueError:
        return False
