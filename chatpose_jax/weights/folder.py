"""The model folder: ``convert`` and training write it, ``chatpose_jax.load`` reads it.

::

    config.json    {"format": "chatpose-jax", "version": 1, "model": {...}, "provenance": {...}}
    tokenizer/     a complete tokenizer, the pose token in its vocabulary, and the processor's settings
    params/        Orbax checkpoint (OCDBT) of the parameter tree
    passengers/    tensors of the sources that the model does not use, kept for export: one safetensors file per layout, and the adapter's; optional

A folder is written under a temporary name and renamed when it is complete, so an interrupted run leaves nothing that loads. If two runs write the
same folder, the second one ends with an error that names the first.
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

from chatpose_jax.errors import UserError
from chatpose_jax.locks import only_writer
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.heads import trusted_head
from chatpose_jax.models.heads.base import PoseHead
from chatpose_jax.processes import all_or_none
from chatpose_jax.weights.arrays import Params, read_arrays, write_arrays
from chatpose_jax.weights.readers import describe_folder, fetch_hint, read_json_object

FORMAT = "chatpose-jax"
VERSION = 1
CONFIG, PARAMS, TOKENIZER, PASSENGERS = "config.json", "params", "tokenizer", "passengers"
MODEL = "model"
"""Name of the model folder inside the folder of a training run or a demo."""


class Savable(Protocol):
    """An object that writes its files into a folder, such as the processor."""

    def save(self, folder: Path) -> Any: ...


def save_folder(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    processor: Savable,
    provenance: Mapping[str, Any] | None = None,
    passengers: Path | None = None,
    overwrite: bool = False,
) -> Path:
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
                    shutil.copytree(passengers / PASSENGERS, partial / PASSENGERS)
        write_arrays(partial / PARAMS, params)
        if jax.process_index() == 0:
            write_config(partial, config, provenance=provenance)
    return Path(path)


@contextlib.contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Context manager: yields a temporary folder beside ``path``, and renames it to ``path`` if the block succeeds. If the block raises, in this
    process or another one of the run, the folder is removed. All processes write into the same folder.

    A temporary folder that a killed run left behind is replaced. Raises UserError if another run is writing ``path``, if ``path`` exists and
    ``overwrite`` is not set, or if it is neither empty nor a model folder of ours. Nothing else is ever deleted.
    """
    path = Path(path)
    primary = jax.process_index() == 0
    partial = path.parent / f".{path.name}.partial"
    with contextlib.ExitStack() as held:
        with all_or_none():
            if primary:
                held.enter_context(only_writer(path, path.parent / f".{path.name}.lock"))
                _check_free(path, overwrite)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
        try:
            with all_or_none():
                yield partial
            with all_or_none():
                if primary:
                    _check_free(path, overwrite)
                    _put_in_place(partial, path)
        except BaseException:
            if primary:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _check_free(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path} exists already; choose another folder, or say --overwrite")
    if not (is_model_folder(path) or (path.is_dir() and not any(path.iterdir()))):
        raise UserError(f"{path} exists and is no model folder of this program; it is not overwritten")


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
def explained(out: str | Path, needs: str, too_large: str = "") -> Iterator[None]:
    """Context manager around code that writes ``out``: turns the system's errors on writing there, TensorStore's among them, into one UserError.
    Errors that do not concern writing, or concern another file, pass unchanged.

    needs: how large the result is. too_large: advice if a file is larger than the file system allows.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
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


def _put_in_place(partial: Path, path: Path) -> None:
    """Renames. An existing ``path`` is first moved away as a whole, so a half-deleted folder never has that name."""
    replaced = path.parent / f".{path.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    try:
        partial.rename(path)
    except OSError:
        if replaced.exists():
            replaced.rename(path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def write_config(folder: Path, config: ModelConfig, *, provenance: Mapping[str, Any] | None = None) -> None:
    """Writes ``config.json``, the last file of a folder."""
    data: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model": config.to_json()}
    if provenance:
        data["provenance"] = dict(provenance)
    (folder / CONFIG).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_folder(path: str | Path) -> dict[str, Any]:
    """Reads and checks ``config.json`` of a model folder. Raises UserError for an incomplete folder, another program's folder (with the command that
    converts it), or a newer version of the format.
    """
    path = Path(path)
    if not path.is_dir():
        what = "a file" if path.exists() else "no such folder"
        hint = "" if path.exists() else fetch_hint(path)
        raise UserError(f"{path}: {what}; expected a model folder (config.json, tokenizer/, params/){hint}")
    if (path / CONFIG).is_file():
        data = read_json_object(path / CONFIG)
        if data.get("format") == FORMAT:
            if data.get("version") != VERSION:
                raise UserError(
                    f"{path}: written in version {data.get('version')} of the format, this program reads {VERSION}; upgrade it"
                )
            if missing := [name for name in (PARAMS, TOKENIZER) if not (path / name).is_dir()]:
                raise UserError(
                    f"{path}: half a model folder: {' and '.join(missing)} missing; convert or copy it again"
                )
            return data
    if is_source(path):
        raise UserError(
            f"{path}: a PyTorch checkpoint, not a model folder; convert it first: chatpose convert {path} OUT"
        )
    if is_model_folder(path / MODEL):
        raise UserError(f"{path}: no model folder; {path / MODEL} is one")
    if known := describe_folder(path):
        raise UserError(f"{path}: no model folder, but {known}")
    raise UserError(
        f"{path}: no model folder: expected config.json with format {FORMAT!r}, beside tokenizer/ and params/"
    )


def is_model_folder(path: str | Path) -> bool:
    """Whether ``config.json`` says that this program wrote the folder; other programs write a ``config.json`` too."""
    config = Path(path) / CONFIG
    return config.is_file() and read_json_object(config).get("format") == FORMAT


def find_model(path: str | os.PathLike[str]) -> Path:
    """The folder itself, or ``path/model``, where a training run or a demo writes its model, if only that is a model folder."""
    path = Path(path)
    inner = path / MODEL
    return inner if not is_model_folder(path) and not is_source(path) and is_model_folder(inner) else path


def is_source(path: str | Path) -> bool:
    """Whether a folder contains PyTorch weights, or a file is one of them."""
    path = Path(path)
    suffixes = (".safetensors", ".bin", ".pt", ".pth")
    return path.suffix in suffixes if path.is_file() else any(file.suffix in suffixes for file in path.glob("*"))


@contextlib.contextmanager
def another_head(path: str | Path, config: ModelConfig) -> Iterator[None]:
    """Around what loads a folder: if ``config`` has another pose head than the folder was trained with, a UserError says so first."""
    try:
        yield
    except UserError as error:
        if (saved := read_config(path).head.name) == config.head.name:
            raise
        raise UserError(
            f"{path} was trained with the pose head {saved!r}, and --head names {config.head.name!r}, which does not fit: {error}"
        ) from error


def load_model_config(path: str | Path, head: str | type[PoseHead] | None = None) -> ModelConfig:
    """The model configuration of a folder, with its pose head resolved.

    head: the pose head, as "package.module:Class" or the class, if this program does not find it by itself. The folder may be a stranger's, so
        its ``config.json`` never imports code.

    Raises UserError: what ``read_folder`` raises; a head that the user has to name.
    """
    config = read_config(path)
    return config.replace(head=trusted_head(str(path), config.head, head))


def read_config(path: str | Path) -> ModelConfig:
    """The model configuration of a folder, for inspection only: nothing is imported, so the pose head may be unknown. Raises what ``read_folder``
    raises.
    """
    try:
        return ModelConfig.from_json(read_folder(path)["model"])
    except KeyError:
        raise UserError(f"{path}: config.json has no table 'model'") from None


def load_params(path: str | Path, abstract: Params) -> Params:
    """The parameters of a folder as a nested dict, cast and sharded as ``abstract`` says.

    abstract: nested ``jax.ShapeDtypeStruct``s. With a ``sharding``, each process reads only what its devices need.

    Raises UserError: what ``read_folder`` raises; one error for all leaves that are missing, extra or of another shape; damaged data.
    """
    read_folder(path)
    return read_arrays(Path(path) / PARAMS, abstract)
