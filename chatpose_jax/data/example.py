"""One row of training or evaluation data. All data sets give rows of this form."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.settings import check_value, one_line
from smpl_jax.pose import Pose, check_shapes, unmeasured

NO_POSES = unmeasured((0,))
Kind = Literal["text", "image", "instruction"]
AT_ONCE = 128
"""Rows that ``rows_in_turn`` reads together, and has in memory."""


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


class ExampleRows(Sequence[Example]):
    """A data set that can read several rows together, as from an object store.

    A subclass has ``__len__`` and ``__getitems__``, as data sets of PyTorch may have.
    """

    def __getitems__(self, numbers: Sequence[int]) -> list[Example]:
        """Some rows, each given as its number from 0."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        """Row ``index``, or the rows of a slice; IndexError beyond the size."""
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        if not 0 <= operator.index(index) < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __iter__(self) -> Iterator[Example]:
        return rows_in_turn(self)


def rows_at(dataset: Sequence[Example], numbers: Sequence[int]) -> list[Example]:
    """Some rows of any data set, read together where it can (``ExampleRows``)."""
    together = getattr(dataset, "__getitems__", None)
    return together(numbers) if together else [dataset[number] for number in numbers]


def rows_in_turn(dataset: Sequence[Example], numbers: Iterable[int] | None = None) -> Iterator[Example]:
    """These rows of a data set, or all, one after the other. ``AT_ONCE`` are read together."""
    places = iter(range(len(dataset)) if numbers is None else numbers)
    while some := list(itertools.islice(places, AT_ONCE)):
        yield from rows_at(dataset, some)


def rows_from(datasets: Sequence[Sequence[Example]], places: Sequence[tuple[int, int]]) -> list[Example]:
    """Rows of several data sets, each given as (number of the data set, row); those of one are read together."""
    found = {
        number: iter(rows_at(datasets[number], [row for owner, row in places if owner == number]))
        for number in {number for number, _ in places}
    }
    return [next(found[number]) for number, _ in places]
