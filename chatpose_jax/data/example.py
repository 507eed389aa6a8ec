"""One row of training or evaluation data, the meeting point of all data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from chatpose_jax.settings import one_line

Kind = Literal["text", "image", "instruction"]


@dataclasses.dataclass(frozen=True, eq=False)
class LazyPicture:
    """A picture that is made when it is looked at, for rows whose pictures come from code: their text alone says how
    long a row is.

    make: gives (H, W, 3) uint8, the same at every call.
    """

    make: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.make(), dtype)


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation and the poses that its answers show.

    messages: as OpenAI and transformers write them: ``{"role": "user" | "assistant", "content": str | [parts]}``, a part being
        ``{"type": "text", "text": str}`` or ``{"type": "image", "image": path | PIL image | (H, W, 3) uint8 array |
        LazyPicture}``. Assistant text
        marks each pose with the literal ``<POSE>``.
    poses: (P, 24, 3, 3) float32 rotation matrices, SMPL joint order, joint 0 the global orientation in the camera frame (x right, y down,
        z away); one for each ``<POSE>`` in order of appearance. P may be 0.
    """

    id: str
    kind: Kind
    messages: list[dict[str, Any]]
    poses: np.ndarray

    __repr__ = one_line
