"""Writes model folders, and other folders, so that an interrupted run leaves nothing that loads.

On a disk a folder is written under a temporary name and renamed when it is complete. An object store has no renames: there it is written in place,
and the object ``.unfinished`` is in it until it is complete. If two runs write the same folder, the second one ends with an error that names the
first.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from etils import epath

from chatpose_jax.errors import UserError
from chatpose_jax.locks import Locked, only_writer
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.processes import all_or_none
from chatpose_jax.storage import Location, copy_tree, is_bucket, location, reachable, remove_tree, write_bytes
from chatpose_jax.weights.arrays import Params, write_arrays
from chatpose_jax.weights.folder import (
    CONFIG,
    FORMAT,
    PARAMS,
    PASSENGERS,
    TOKENIZER,
    UNFINISHED,
    VERSION,
    is_model_folder,
    is_unfinished,
)


class Savable(Protocol):
    """An object that writes its files into a folder, such as the processor."""

    def save(self, folder: Location) -> Any: ...


def save_folder(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    processor: Savable,
    provenance: Mapping[str, Any] | None = None,
    passengers: Location | None = None,
    overwrite: bool = False,
) -> Location:
    """Writes a model folder atomically. Every process of a run calls it.

    Args:
        path: the folder; must not exist, unless ``overwrite``.
        params: nested dict of arrays on any mesh, layers stacked.
        processor: its ``save`` writes ``tokenizer/``.
        provenance: where the weights come from, as JSON values.
        passengers: the model folder from which the run started; its ``passengers/`` is copied.
    """
    with new_folder(path, overwrite=overwrite) as partial:
        with all_or_none():
            if jax.process_index() == 0:
                processor.save(partial / TOKENIZER)
                if passengers is not None and (passengers / PASSENGERS).is_dir():
                    copy_tree(passengers / PASSENGERS, partial / PASSENGERS)
        write_arrays(partial / PARAMS, params)
        if jax.process_index() == 0:
            write_config(partial, config, provenance=provenance)
    return location(path)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Location]:
    """Context manager: yields a folder to write, which becomes ``path`` if the block succeeds. If the block raises, in this process or another one of
    the run, the folder is removed. All processes write into the same folder. In an object store it is ``path`` itself, marked as unfinished.

    What a killed run left behind is replaced. Raises UserError if another run is writing ``path``, if ``path`` exists and ``overwrite`` is not set,
    or if ``path`` is neither empty nor a model folder. Nothing else is ever deleted.
    """
    path = location(path)
    primary = jax.process_index() == 0
    place: _Renamed | _Marked = _Marked(path) if isinstance(path, epath.Path) else _Renamed(path)
    with contextlib.ExitStack() as held:
        with all_or_none():
            if primary:
                if is_bucket(path) and len(path.parts) < 4:
                    raise UserError(f"{path}: a whole bucket; name a folder in it")
                lock = held.enter_context(only_writer(path, path.parent / f".{path.name}.lock"))
                with reachable(path):
                    _check_free(path, overwrite)
                place.begin()
        try:
            with all_or_none():
                yield place.partial
            with all_or_none():
                if primary:
                    lock.check()
                    place.publish(overwrite)
        except BaseException:
            if primary:
                with contextlib.suppress(Locked):
                    lock.check()  # what another process has begun to write there is its own
                    place.give_up()
            raise


class _Renamed:
    """A folder on a disk, under a temporary name."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.parent / f".{path.name}.partial"

    def begin(self) -> None:
        self.give_up()
        self.partial.mkdir()

    def publish(self, overwrite: bool) -> None:
        """An existing folder is first renamed as a whole, so a half-deleted one never has that name."""
        _check_free(self.path, overwrite)
        replaced = self.path.parent / f".{self.path.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if self.path.exists():
            self.path.rename(replaced)
        try:
            self.partial.rename(self.path)
        except OSError:
            if replaced.exists():
                replaced.rename(self.path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)

    def give_up(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


class _Marked:
    """A folder in an object store, in place."""

    def __init__(self, path: epath.Path):
        self.partial, self.mark = path, path / UNFINISHED

    def begin(self) -> None:
        write_bytes(self.mark, "This folder is not complete: it is being written, or its writer died.\n")
        self._clear()

    def publish(self, overwrite: bool) -> None:
        self.mark.unlink()

    def give_up(self) -> None:
        self._clear()
        self.mark.unlink(missing_ok=True)

    def _clear(self) -> None:
        for entry in self.partial.iterdir():
            if entry.name != UNFINISHED:
                remove_tree(entry)


def _check_free(path: Location, overwrite: bool) -> None:
    if not path.exists() or is_unfinished(path):
        return
    if not overwrite:
        raise UserError(f"{path} exists already; choose another folder, or add --overwrite")
    if not (is_model_folder(path) or (path.is_dir() and not any(path.iterdir()))):
        raise UserError(f"{path} exists and is not a model folder, so it is not overwritten; choose another folder")


_UNWRITABLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file would pass the limit on file sizes (ulimit -f, or the file system's)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.EIO: "a disk failed",
    errno.ENAMETOOLONG: "a file name is too long for the file system",
}


@contextlib.contextmanager
def explained(out: str | os.PathLike[str], needs: str, too_large: str = "") -> Iterator[None]:
    """Context manager around code that writes ``out``: turns the system's errors on writing there, TensorStore's among them, into one UserError.
    Errors that do not concern writing, or concern another file, pass unchanged.

    needs: how large the result is. too_large: advice if a file is larger than the file system allows.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if is_bucket(out):
            with reachable(location(out)):
                raise
        number, file = getattr(error, "errno", None), getattr(error, "filename", None)
        if told := re.search(r"os_error_code='(\d+)'", str(error)):
            number = int(told[1])
        elif "RESOURCE_EXHAUSTED" in str(error):
            number = errno.ENOSPC
        why = _UNWRITABLE.get(number or 0, "cannot be written" if told else None)
        if isinstance(error, UserError) or why is None or not _is_of(Path(out), file):
            raise
        hint = f"; {too_large}" if too_large and number == errno.EFBIG else ""
        said = " ".join(str(error).split())
        raise UserError(f"{out}: {why}; {needs}{hint}; nothing was left behind ({said:.300})") from None


def _is_of(out: Path, file: Any) -> bool:
    """Whether the file that an OSError names belongs to ``out``; True if the error names no file."""
    if not isinstance(file, str | os.PathLike):
        return True
    beside = Path(os.path.abspath(out.parent))
    return any(Path(os.path.abspath(file)).is_relative_to(beside / name) for name in (out.name, f".{out.name}.partial"))


def write_config(folder: Location, config: ModelConfig, *, provenance: Mapping[str, Any] | None = None) -> None:
    """Writes ``config.json``, the last file of a folder."""
    data: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model": config.to_json()}
    if provenance:
        data["provenance"] = dict(provenance)
    write_bytes(folder / CONFIG, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
