"""4D-Humans' filter of improbable poses: how often each joint has such a rotation in AMASS."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from chatpose_jax.errors import UserError

HISTOGRAM = "amass_poses_hist100_SMPL+H_G.npy"
JOINTS = 21
THRESHOLDS = np.array(
    [
        5e-5,
        5e-5,
        2e-3,
        5e-6,
        5e-6,
        0.01,
        5e-6,
        5e-6,
        0.025,
        0,
        0,
        2e-4,
        4.5e-4,
        4.5e-4,
        5e-4,
        2e-4,
        2e-4,
        4e-5,
        4e-5,
        1e-3,
        1e-3,
    ]
)
"""The densities that the joints 1 to 21 of SMPL must exceed. From ``hmr2/datasets/smplh_prob_filter.py``."""
_SIGMA, _TRUNCATE = 2, 4


class Plausible:
    """Says whether the axis-angle vectors of a pose are common.

    density: (21, n, n, n), the smoothed density of each joint's vector over the cube (-π, π)³. It takes 84 MB.
    """

    def __init__(self, density: np.ndarray) -> None:
        self.density = density

    @classmethod
    def load(cls, path: Path) -> Plausible:
        """Reads 4D-Humans' histogram (21, 100, 100, 100), and smooths it along all axes, as 4D-Humans does. Raises UserError for another file."""
        try:
            counts = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read as a histogram of poses ({error})") from None
        bins = counts.shape[-1] if isinstance(counts, np.ndarray) and counts.ndim == 4 else 0
        if not 1 <= bins <= 200 or counts.shape != (JOINTS, bins, bins, bins) or counts.dtype.kind not in "fiu":
            raise UserError(
                f"{path}: expected counts of shape ({JOINTS}, 100, 100, 100), found {getattr(counts, 'shape', 'none')}"
            )
        density = counts.astype(np.float32)
        total = float(density.sum(dtype=np.float64))
        if not np.isfinite(total) or total <= 0:
            raise UserError(f"{path}: expected counts of poses, found a sum of {total}")
        density *= 1 / (total * (2 * np.pi / bins) ** 3)
        for axis in range(4):
            density = _smoothed(density, axis)
        return cls(density)

    def __call__(self, axis_angle: np.ndarray) -> bool:
        """Whether no joint is in a rare pose. axis_angle: (21, 3), radians, of the joints 1 to 21."""
        angle = np.linalg.norm(axis_angle, axis=-1, keepdims=True)
        short = np.where(angle > np.pi, np.remainder(angle + np.pi, 2 * np.pi) - np.pi, angle)
        vectors = axis_angle * (short / np.maximum(angle, 1e-8))
        bins = self.density.shape[-1]
        x, y, z = ((vectors + np.pi) / (2 * np.pi) * (bins - 1e-6)).astype(int).clip(0, bins - 1).T
        return bool((self.density[np.arange(JOINTS), x, y, z] > THRESHOLDS).all())


def _smoothed(array: np.ndarray, axis: int) -> np.ndarray:
    """Smooths along one axis with a Gaussian, with zeros beyond the edges."""
    reach = _SIGMA * _TRUNCATE
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _SIGMA) ** 2)
    weights /= weights.sum()
    array = np.moveaxis(array, axis, 0)
    out = np.zeros_like(array)
    for shift, weight in zip(range(-reach, reach + 1), weights.astype(array.dtype)):
        to, source = (
            slice(max(0, -shift), len(array) - max(0, shift)),
            slice(max(0, shift), len(array) - max(0, -shift)),
        )
        if to.start < to.stop:
            out[to] += weight * array[source]
    return np.moveaxis(out, 0, axis)
