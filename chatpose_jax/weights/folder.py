"""Reads model folders. ``save`` writes them, for ``convert`` and training.

::

    config.json    {"format": "chatpose-jax", "version": 1, "model": {...}, "provenance": {...}}
    tokenizer/     a complete tokenizer, the pose token in its vocabulary, and the processor's settings
    params/        Orbax checkpoint (OCDBT) of the parameter tree
    passengers/    tensors of the sources that the model does not use, kept for export: one safetensors file per layout, and the adapter's; optional

In an object store, ``.unfinished`` is there until all of them are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.heads import trusted_head
from chatpose_jax.models.heads.base import PoseHead
from chatpose_jax.storage import Location, is_bucket, location, reachable
from chatpose_jax.weights.arrays import Params, read_arrays
from chatpose_jax.weights.readers import describe_folder, fetch_hint, read_json_object

FORMAT = "chatpose-jax"
VERSION = 1
CONFIG, PARAMS, TOKENIZER, PASSENGERS = "config.json", "params", "tokenizer", "passengers"
UNFINISHED = ".unfinished"
"""The first object of a folder that is written into an object store, and the last that goes."""
MODEL = "model"
"""Name of the model folder inside the folder of a training run or a demo."""


def read_folder(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks ``config.json`` of a model folder. Raises UserError for an incomplete folder, another program's folder (with the command that
    converts it), or a newer version of the format.
    """
    path = location(path)
    with reachable(path):
        return _read_folder(path)


def _read_folder(path: Location) -> dict[str, Any]:
    if not path.is_dir():
        a_file = path.is_file()  # in a store another process may begin the folder meanwhile
        what = "a file" if a_file else "no such folder"
        hint = "" if a_file or is_bucket(path) else fetch_hint(path)
        raise UserError(f"{path}: {what}; expected a model folder (config.json, tokenizer/, params/){hint}")
    if is_unfinished(path):
        raise UserError(
            f"{path}: incomplete model folder: it is still being written, or its writer died; wait, or write it again"
        )
    if (path / CONFIG).is_file():
        data = read_json_object(path / CONFIG)
        if data.get("format") == FORMAT:
            if data.get("version") != VERSION:
                raise UserError(
                    f"{path}: the format's version is {data.get('version')}, this program reads version {VERSION}; upgrade it"
                )
            if missing := [name for name in (PARAMS, TOKENIZER) if not (path / name).is_dir()]:
                raise UserError(
                    f"{path}: incomplete model folder: {' and '.join(missing)} missing; convert or copy it again"
                )
            return data
    if is_source(path):
        first = "copy it to a disk and convert it" if is_bucket(path) else "convert it first"
        raise UserError(
            f"{path}: a PyTorch checkpoint, not a model folder; {first}: chatpose convert {'COPY' if is_bucket(path) else path} OUT"
        )
    if is_model_folder(path / MODEL):
        raise UserError(f"{path}: not a model folder; give {path / MODEL} instead")
    if known := describe_folder(path):
        raise UserError(f"{path}: not a model folder, but {known}")
    raise UserError(f"{path}: not a model folder; expected config.json with format {FORMAT!r}, tokenizer/ and params/")


def is_unfinished(path: Location) -> bool:
    """Whether a folder in an object store is not complete, or never will be. On a disk a model folder gets its name when it is complete."""
    return is_bucket(path) and (path / UNFINISHED).exists()


def is_model_folder(path: str | os.PathLike[str]) -> bool:
    """Whether ``config.json`` says that this program wrote the folder; other programs write a ``config.json`` too."""
    path = location(path)
    config = path / CONFIG
    with reachable(path):
        return config.is_file() and read_json_object(config).get("format") == FORMAT


def find_model(path: str | os.PathLike[str]) -> Location:
    """The folder itself, or ``path/model``, where a training run or a demo writes its model, if only that is a model folder."""
    path = location(path)
    inner = path / MODEL
    with reachable(path):
        return inner if not is_model_folder(path) and not is_source(path) and is_model_folder(inner) else path


def is_source(path: str | os.PathLike[str]) -> bool:
    """Whether a folder contains weights that ``convert`` reads, or a file is one of them."""
    path = location(path)
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    if not path.is_dir():
        return path.suffix in suffixes and path.is_file()
    return any(file.suffix in suffixes for file in path.glob("*"))


@contextlib.contextmanager
def another_head(path: str | os.PathLike[str], config: ModelConfig) -> Iterator[None]:
    """Context manager around loading a folder: if it fails and ``config`` has another pose head than the folder, the error says so."""
    try:
        yield
    except UserError as error:
        if (saved := read_config(path).head.name) == config.head.name:
            raise
        raise UserError(
            f"{path} was trained with the pose head {saved!r}, and --head names {config.head.name!r}, which does not fit: {error}"
        ) from error


def load_model_config(path: str | os.PathLike[str], head: str | type[PoseHead] | None = None) -> ModelConfig:
    """The model configuration of a folder, with its pose head resolved.

    head: the pose head, as "package.module:Class" or the class, if this program does not find it by itself. The folder may be a stranger's, so
        its ``config.json`` never imports code.

    Raises UserError: what ``read_folder`` raises; a head that the user has to name.
    """
    config = read_config(path)
    return config.replace(head=trusted_head(str(path), config.head, head))


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The model configuration of a folder, for inspection only: nothing is imported, so the pose head may be unknown. Raises what ``read_folder``
    raises.
    """
    try:
        return ModelConfig.from_json(read_folder(path)["model"])
    except KeyError:
        raise UserError(f"{path}: config.json has no table 'model'; convert or copy it again") from None


def load_params(path: str | os.PathLike[str], abstract: Params) -> Params:
    """The parameters of a folder as a nested dict, cast and sharded as ``abstract`` says.

    abstract: nested ``jax.ShapeDtypeStruct``s. With a ``sharding``, each process reads only what its devices need.

    Raises UserError: what ``read_folder`` raises; one error for all leaves that are missing, extra or of another shape; damaged data.
    """
    read_folder(path)
    return read_arrays(location(path) / PARAMS, abstract)
