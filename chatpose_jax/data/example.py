"""One row of training or evaluation data. All data sets give rows of this form."""

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
class LazyImage:
    """An image that is made when it is needed, for rows whose images come from code. Measuring a row makes none.

    make: gives (H, W, 3) uint8, the same at every call.
    """

    make: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.make(), dtype)


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation and the poses that its answers show.

    messages: ``{"role": "user" | "assistant", "content": str | [parts]}``, the form of OpenAI's API and transformers. A part is
        ``{"type": "text", "text": str}`` or ``{"type": "image", "image": path | PIL image | (H, W, 3) uint8 array | LazyImage}``. ``<POSE>``
        stands for a pose in the assistant's text.
    poses: a ``Pose`` of batch shape (P,), one for each ``<POSE>`` in order of appearance; by default none. Any frame and body family:
        batches hold them in the camera frame, with the joints of the pose head and the first ten betas. Joints that ``measured`` leaves
        out, and betas and translations that are not there, count in no loss.
    """

    id: str
    kind: Kind
    messages: list[dict[str, Any]]
    poses: Pose = NO_POSES

    __repr__ = one_line
