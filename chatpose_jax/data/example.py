"""One row of training or evaluation data, the meeting point of all data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from chatpose_jax.settings import one_line
from smpl_jax.pose import Pose, unmeasured

NO_POSES = unmeasured((0,))
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
    poses: a ``Pose`` of batch shape (P,), one for each ``<POSE>`` in order of appearance; by default none. Any frame and body family:
        batches hold them in the camera frame, with the joints of the pose head and the first ten betas. Joints that ``measured`` leaves
        out, and betas and translations that are not there, count in no loss.
    """

    id: str
    kind: Kind
    messages: list[dict[str, Any]]
    poses: Pose = NO_POSES

    __repr__ = one_line
