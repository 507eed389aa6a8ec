"""One row of training or evaluation data. All data sets give rows of this form."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.settings import check_value, one_line
from smpl_jax.pose import Pose, check_shapes, unmeasured

NO_POSES = unmeasured((0,))
Kind = Literal["text", "image", "instruction"]


@dataclasses.dataclass(frozen=True, eq=False)
class LazyImage:
    """An image that is made when it is needed, for rows whose images come from code. Measuring a row makes none.

    make: gives (H, W, 3) uint8, the same at every call. Where the row is encoded, an exception in it becomes one line that names the row.
    shape: (H, W, 3) if it is known, so that the size is known without the image.
    """

    make: Callable[[], np.ndarray]
    shape: tuple[int, int, int] | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.make(), dtype)


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation and the poses that its answers show.

    kind: validation reports each kind apart. It says nothing of how a row is used: any row may have images, and any may have poses.
    messages: ``{"role": "user" | "assistant", "content": str | [parts]}``, the form of OpenAI's API and transformers. A part is
        ``{"type": "text", "text": str}`` or ``{"type": "image", "image": path | bytes | PIL image | (H, W, 3) uint8 array | LazyImage}``. ``<POSE>``
        stands for a pose in the assistant's text.
    poses: a ``Pose`` of batch shape (P,), one for each ``<POSE>`` in order of appearance; by default none. Any frame and body family:
        batches hold them in the camera frame, with the joints of the pose head and the first ten betas. Joints that ``measured`` leaves
        out, and betas and translations that are not there, count in no loss. Batches drop ``Pose.shape_space``, so the betas of all sources
        must belong to one body.
    extras: what evaluation needs and training does not (``data.record.Record``).
    group: the sequence, motion file or clip that the row comes from; rows of one group are alike.
    where: names the row in errors; ``data.sources.NamedRows`` sets it. Without it, errors give the id.
    """

    id: str
    kind: Kind
    messages: list[dict[str, Any]]
    poses: Pose = NO_POSES
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    where: str = dataclasses.field(default="", repr=False, compare=False)
    group: str = dataclasses.field(default="", repr=False, compare=False)

    __repr__ = one_line

    @property
    def place(self) -> str:
        """What errors call this row."""
        return self.where or f"example {self.id!r}"

    def at(self, where: str) -> Self:
        """The same row, which errors call ``where``."""
        moved = copy.copy(self)
        object.__setattr__(moved, "where", where)
        return moved

    def check(self) -> None:
        """Raises UserError, which does not name the row, unless the kind is known and the poses are a ``Pose`` of batch shape (P,).

        Shapes are checked, and that numbers are finite, but not that matrices are rotations. Messages are checked where they are encoded.
        """
        check_value("kind", self.kind, Kind)
        try:
            check_shapes(self.poses)
        except ValueError as error:
            raise UserError(f"poses: {error}") from None
        if len(self.poses.shape) != 1:
            raise UserError(
                f"poses: expected a Pose of batch shape (P,), one for each <POSE>, found {self.poses.shape}"
            )
