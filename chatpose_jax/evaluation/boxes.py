"""Boxes of people in an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from chatpose_jax.errors import UserError

LEAST_OVERLAP = 0.3
"""Intersection over union from which on a box is that of the person."""


def best_overlap(boxes: np.ndarray, box: np.ndarray) -> int | None:
    """The box (P, 4) with the largest intersection over union with ``box`` (4,), or None if that is below ``LEAST_OVERLAP``.

    Boxes are left, top, width and height in pixels.
    """
    if not len(boxes):
        return None
    boxes, box = np.asarray(boxes, np.float64), np.asarray(box, np.float64)
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, :2] + boxes[:, 2:], box[:2] + box[2:])
    shared = np.clip(high - low, 0, None).prod(1)
    overlap = shared / np.maximum(boxes[:, 2:].prod(1) + box[2:].prod() - shared, 1e-9)
    best = int(overlap.argmax())
    return best if overlap[best] >= LEAST_OVERLAP else None


def person_box(extras: Mapping[str, Any], key: str) -> np.ndarray:
    """(4,) left, top, width and height of the person of a row. Raises UserError where its extras have no box."""
    if "bbox" in extras:
        return np.asarray(extras["bbox"], np.float64)
    if "box" in extras:
        x, y, side = np.asarray(extras["box"], np.float64)
        return np.array([x - side / 2, y - side / 2, side, side])
    raise UserError(f"row {key!r} has no box, so the person among those of the answer cannot be found")
