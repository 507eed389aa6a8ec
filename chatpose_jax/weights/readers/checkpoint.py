"""Checkpoints: the tensors of one file, of a folder, or of shards with an index, and the JSON files beside them."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line
from chatpose_jax.storage import Location
from chatpose_jax.weights.readers.entry import TensorEntry
from chatpose_jax.weights.readers.foreign import demand_native, demand_native_start, describe_folder
from chatpose_jax.weights.readers.safetensors import read_safetensors_header
from chatpose_jax.weights.readers.torch_zip import read_torch_header

_HEADERS: dict[str, Callable[[Path], dict[str, TensorEntry]]] = {
    ".safetensors": read_safetensors_header,
    ".bin": read_torch_header,
    ".pt": read_torch_header,
    ".pth": read_torch_header,
}
# All programs look for safetensors first. If there is both a file and an index, transformers reads the file, and others (vLLM) read the index.
_CANDIDATES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# A separate projector, as LLaVA's pre-training stage writes it beside or instead of a model.
_PROJECTORS = ("mm_projector.safetensors", "mm_projector.bin")
# The files of PEFT, and the one that LLaVA's own LoRA training adds.
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE_ADAPTERS = "non_lora_trainables.bin"
GGUF_SUFFIX = ".gguf"
_MAX_SETTINGS = 100_000_000
"""Largest size of a settings file in bytes."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint by name, from one or more files.

    folder: the folder of ``config.json`` and the tokenizer, if there are any. unread: files of other weights in the folder, which every program
    reads only if these are absent.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    unread: tuple[Path, ...] = ()

    __repr__ = one_line

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def dtype(self) -> np.dtype:
        """The floating-point dtype of most bytes; float32 if there is none."""
        count: collections.Counter[np.dtype] = collections.Counter()
        for entry in self.tensors.values():
            if np.issubdtype(entry.dtype, np.floating) or entry.dtype == ml_dtypes.bfloat16:
                count[entry.dtype] += entry.nbytes
        return count.most_common(1)[0][0] if count else np.dtype(np.float32)

    @property
    def formats(self) -> dict[str, int]:
        """Format in the files → number of tensors, the most frequent first."""
        return dict(collections.Counter(entry.stored for entry in self.tensors.values()).most_common())

    def config(self) -> dict[str, Any]:
        """``config.json`` of the folder; ``{}`` if there is none. Raises UserError if it is not a JSON object."""
        return read_json_object(self.folder / "config.json") if (self.folder / "config.json").is_file() else {}

    def tokenizer_files(self) -> dict[str, bytes] | None:
        """The files of a tokenizer inside the weights' file, name → content; ``None`` if the tokenizer lies in the folder."""
        return None


def read_json_object(path: Location) -> dict[str, Any]:
    """Reads a JSON object from a file of at most 100 MB. Raises UserError if the file is not one."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_SETTINGS + 1)
    except OSError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if len(content) > _MAX_SETTINGS:
        raise UserError(
            f"{path}: too large for a settings file; expected at most {_MAX_SETTINGS} bytes; fetch it again"
        )
    return parse_json_object(content, path)


def parse_json_object(content: bytes, where: str | Path) -> dict[str, Any]:
    """The JSON object that the content of a file holds; ``where`` names it in errors. Raises UserError if it holds none."""
    demand_native_start(content, where)
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(data).__name__}")
    return data


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder, one file or one index. Only headers are read. A GGUF file, or a folder with one and no other weights, is a
    ``GGUFCheckpoint``.

    Raises UserError: no weights; two sets of weights of which other programs would read the other one; an index that lists a missing file or tensor;
    a tensor in two shards; a damaged file.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == GGUF_SUFFIX:
            from chatpose_jax.weights.readers.gguf import open_gguf

            return open_gguf(path)
        return _from_index(path) if path.name.endswith(".index.json") else _from_files(path.parent, [path])
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    found = [[path / name for name in names if (path / name).is_file()] for names in _CANDIDATES]
    if first := next(filter(None, found), None):
        _demand_one(path, *first)
        checkpoint = _from_index(first[0]) if first[0].suffix == ".json" else _from_files(path, first[:1])
        others = [file for file in path.iterdir() if file.suffix in _HEADERS and _is_shard(file)]
        others += [file for files in found for file in files if file.suffix in _HEADERS]
        return dataclasses.replace(checkpoint, unread=tuple(sorted({*others} - {*checkpoint.files})))
    loose = sorted(file for file in path.iterdir() if file.suffix in _HEADERS and _is_shard(file))
    taken = [file for file in loose if file.suffix == ".safetensors"] or loose
    if taken:
        return dataclasses.replace(_from_files(path, taken), unread=tuple(sorted({*loose} - {*taken})))
    wrapped = [path / name for name in ADAPTER_FILES if (path / name).is_file()][:1]
    if wrapped:
        return _from_files(path, [*wrapped, *(file for file in [path / _BESIDE_ADAPTERS] if file.is_file())])
    if projector := find_projector(path):
        return _from_files(path, [projector])
    if ggufs := sorted(path.glob(f"*{GGUF_SUFFIX}")):
        if len(ggufs) > 1:
            raise UserError(
                f"{path}: {len(ggufs)} GGUF files ({', '.join(file.name for file in ggufs[:5])}); give one of them"
            )
        return open_checkpoint(ggufs[0])
    if what := describe_folder(path):
        raise UserError(f"{path}: {what}")
    expected = ", ".join(name for names in _CANDIDATES for name in names)
    raise UserError(f"{path}: no weights found; expected one of {expected} or shards named model-00001-of-…")


def find_projector(folder: Path) -> Path | None:
    """The file of a separate projector in a folder; ``None`` if there is none. Raises UserError if there are two."""
    found = [folder / name for name in _PROJECTORS if (folder / name).is_file()]
    if len(found) > 1:  # LLaVA's own code reads only the second
        raise UserError(f"{folder}: two projectors, {found[0].name} and {found[1].name}; move one of them away")
    return found[0] if found else None


def _demand_one(folder: Path, first: Path, *others: Path) -> None:
    """Raises UserError if another program would read other weights than ``first``."""
    for other in others:
        weight_map = read_json_object(other).get("weight_map")
        if not isinstance(weight_map, dict) or any(file != first.name for file in weight_map.values()):
            raise UserError(
                f"{folder}: two sets of weights: {first.name}, which transformers reads, and the shards of {other.name}, which "
                f"other programs read; move one of them away, or give {first.name} or {other.name} instead of the folder"
            )
    config = folder / "config.json"
    named = read_json_object(config).get("transformers_weights") if config.is_file() else None
    if named not in (None, first.name):
        raise UserError(
            f"{config}: transformers_weights={named!r} names other weights than {first.name}, which older programs read; "
            "give one of the files instead of the folder"
        )


def _is_shard(file: Path) -> bool:
    return file.name.startswith(("model-", "pytorch_model-")) or file.name in ("open_clip_pytorch_model.bin",)


def _from_files(folder: Path, files: list[Path]) -> Checkpoint:
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        if file.suffix not in _HEADERS:
            raise UserError(f"{file}: expected one of {', '.join(_HEADERS)}")
        demand_native(file)
        for name, entry in _HEADERS[file.suffix](file).items():
            if name in tensors:
                raise UserError(
                    f"{folder}: tensor {name!r} is in both {tensors[name].file.name} and {file.name}; remove one of the files"
                )
            tensors[name] = entry
    if not tensors:
        raise UserError(f"{folder}: {', '.join(file.name for file in files)} contain no tensors")
    return Checkpoint(folder, tuple(files), tensors)


def _from_index(index: Path) -> Checkpoint:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: expected a table 'weight_map' of tensor names and files")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: expected file names as the values of 'weight_map'")
    names = sorted(set(weight_map.values()))
    # An index may only name files of its own folder.
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: names a file outside its folder: {outside[0]!r}")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"{index}: {len(absent)} of the {len(names)} files that it lists are missing: {', '.join(absent[:5])}; fetch them"
        )
    checkpoint = _from_files(index.parent, [index.parent / name for name in names])
    if lost := [name for name in weight_map if name not in checkpoint.tensors]:
        raise UserError(
            f"{index}: lists {len(lost)} tensors that its files do not contain: {', '.join(lost[:5])}; fetch the files again"
        )
    held = {name: checkpoint.tensors[name].file.name for name in weight_map}
    if moved := [name for name, file in weight_map.items() if held[name] != file]:
        raise UserError(
            f"{index}: says that {moved[0]} is in {weight_map[moved[0]]}, but it is in {held[moved[0]]}; the index belongs to other files"
        )
    return checkpoint
