"""``Reader``: what reads the original files of one data set, for ``chatpose data prepare``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from chatpose_jax.data.config import Split
from chatpose_jax.data.record import Record
from chatpose_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class About:
    """What a person must know to get a data set.

    title: its name in full. licence: its name, and in a few words what it allows. page: the web page that offers it.
    files: what must lie in the folder ``--source``, one line for each file or folder. options: the same for options that name more folders.
    """

    title: str
    licence: str
    page: str
    files: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An item that gives no record.

    key: as in ``Record``. reason: a few words that are the same for all items skipped for this reason; they are counted.
    broken: the item is damaged, or not what its format says. Reading stops when too many are broken. Items that are left out on purpose, for
        example because they have no pose, are not broken.
    detail: what exactly is wrong with this item, for the report of broken items.
    """

    key: str
    reason: str
    broken: bool = False
    detail: str = ""


class Reader(Protocol):
    """The reader of one data set. Its keyword-only parameters are its options, checked by their annotations.

    It is created as ``Reader(source, **options)``, with the folder of the original files. The constructor checks the options and that the files
    are there (UserError), and reads only small tables. Readers are pickled to worker processes. Readers that draw random numbers have an option
    ``seed``.
    """

    about: ClassVar[About]

    def __init__(self, source: Path, **options: Any) -> None: ...

    def parts(self, split: Split) -> Sequence[Any]:
        """The parts of a split that can be read on their own: a tar, a clip, a range of rows. Small values that can be pickled and
        have a ``str``, always in the same order. Empty if the data set has no such split."""
        ...

    def read(self, split: Split, part: Any) -> Iterator[Record | Skipped]:
        """The items of a part, always the same in the same order. A damaged item gives a ``Skipped``, and reading continues.
        Raises UserError, which names the file, if nothing of a part can be read."""
        ...


def missing(about: About, *paths: str | Path) -> UserError:
    """The error to raise where original files are not there. It names them, and says what is expected, where to get it, and under which licence."""
    names = ", ".join(map(str, paths[:5])) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
    expected = f"--source is a folder with {'; '.join(about.files)}" + "".join(f"; {line}" for line in about.options)
    return UserError(
        f"{about.title}: {names} not found. {expected}. {where_to_get(about)}. Then type the same command again"
    )


def where_to_get(about: About) -> str:
    """Where to get a data set, and under which licence."""
    return f"Get it from {about.page} (licence: {about.licence})"
