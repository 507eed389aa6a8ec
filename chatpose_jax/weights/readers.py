"""Checkpoint files of the PyTorch world, read by byte range, without torch and without running code from them.

Both formats come down to the same record, ``TensorEntry``: a file, a byte offset, a dtype, a shape and strides.
Reading maps just the bytes that the asked index needs, copies them out and unmaps them, so resident memory never grows
with the file.

Formats: safetensors (8-byte header length, JSON header, raw data) and the zip archives of ``torch.save`` since
PyTorch 1.6 (``data.pkl`` beside one uncompressed member per storage). The pickle is interpreted by an unpickler that
knows a dozen inert names and refuses any other, and that cannot be made to allocate more than the file is worth.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from chatpose_jax.errors import UserError
from smpl_jax.unpickle import ForbiddenGlobal, RestrictedUnpickler, sealed

Index = tuple[slice, ...]

SAFETENSORS_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_TORCH_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# The format's own limit for the header; a data.pkl of the largest model has a few hundred kB.
_MAX_HEADER = 100_000_000
_MAX_PICKLE = 16_000_000
_MAX_BYTEORDER = 16


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. ``strides`` are in elements; ``None`` means C-contiguous. ``offset`` is in bytes from the
    start of ``file``."""

    name: str
    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values (not of the range they are spread over)."""
        return math.prod(self.shape) * self.dtype.itemsize

    def extent(self) -> int:
        """Bytes from ``offset`` to the end of the last element."""
        if math.prod(self.shape) == 0:
            return 0
        strides = self.strides or _contiguous(self.shape)
        return (sum((n - 1) * s for n, s in zip(self.shape, strides)) + 1) * self.dtype.itemsize

    def read(self, index: Index | None = None, *, borrowed: bool = False) -> np.ndarray:
        """The values under ``index`` (slices with step 1, one per axis; ``None`` = all) as a new array in the stored
        dtype. A ``borrowed`` one is spared fresh memory, and good until this thread borrows again.

        What is contiguous in the file is read with one call; else the byte range that spans the asked elements is mapped,
        and unmapped before returning.
        """
        index = index if index is not None else tuple(slice(0, n) for n in self.shape)
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        shape = tuple(max(0, stop - start) for start, stop in bounds)
        if math.prod(shape) == 0:
            return np.empty(shape, self.dtype)
        strides = self.strides or _contiguous(self.shape)
        first = sum(start * stride for (start, _), stride in zip(bounds, strides))
        span = sum((n - 1) * stride for n, stride in zip(shape, strides)) + 1
        # Raw unsigned words: numpy copies them several times faster than the custom float types.
        word = _word(self.dtype)
        if span == math.prod(shape) and _is_contiguous(shape, strides):
            values = _borrow(shape, word) if borrowed else np.empty(shape, word)
            with self.file.open("rb", buffering=0) as file:
                _read_into(file, self.offset + first * word.itemsize, values)
            return values.view(self.dtype)
        flat = np.memmap(self.file, dtype=word, mode="r", offset=self.offset + first * word.itemsize, shape=(span,))
        view = np.lib.stride_tricks.as_strided(flat, shape, [s * word.itemsize for s in strides], writeable=False)
        return np.array(view, order="C").view(self.dtype)


def _word(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


_own = threading.local()
_BORROWED = 32 << 20
"""Bytes that a thread keeps for reading; what is larger is given back."""


def _borrow(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    if size > _BORROWED:
        return np.empty(shape, dtype)
    held = getattr(_own, "memory", None)
    if held is None or held.nbytes < size:
        held = _own.memory = np.empty(size, np.uint8)
    return held[:size].view(dtype).reshape(shape)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return all(n == 1 or stride == packed for n, stride, packed in zip(shape, strides, _contiguous(shape)))


def _read_into(file: io.RawIOBase, offset: int, values: np.ndarray) -> None:
    file.seek(offset)
    rest = values.reshape(-1).view(np.uint8).data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise UserError(f"{getattr(file, 'name', 'file')}: cut off while it was read; fetch it again")
        rest = rest[count:]


# ---------------------------------------------------------------------------------------------------------- safetensors


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one ``.safetensors`` file. Raises UserError for a truncated file or a header that cannot be
    right."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise UserError(
                f"{path}: not a whole safetensors file: its first 8 bytes announce a header of {length} bytes, "
                f"the file has {size}; fetch it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        records = {name: record for name, record in header.items() if name != "__metadata__"}
        entries = {name: _safetensors_entry(path, name, record, 8 + length) for name, record in records.items()}
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path}: the safetensors header is damaged ({type(error).__name__}: {error}); fetch it again"
        ) from None
    _check_extent(path, entries.values(), size)
    end, last = 0, ""
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset < end:
            raise UserError(
                f"{path}: tensors {last!r} and {entry.name!r} overlap at byte {entry.offset}; the header is damaged"
            )
        end, last = entry.offset + entry.nbytes, entry.name
    return entries


def _safetensors_entry(path: Path, name: str, record: Mapping[str, Any], data_start: int) -> TensorEntry:
    if record["dtype"] not in SAFETENSORS_DTYPES:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise UserError(f"{path}: tensor {name!r} has dtype {record['dtype']!r}; known are {known}")
    dtype = np.dtype(SAFETENSORS_DTYPES[record["dtype"]])
    shape = tuple(int(n) for n in record["shape"])
    start, stop = (int(n) for n in record["data_offsets"])
    if min(shape, default=0) < 0 or start < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} cannot fill bytes {start}..{stop}; the "
            f"header is damaged"
        )
    return TensorEntry(name, path, data_start + start, dtype, shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice")
    return table


def _check_extent(path: Path, entries: Any, size: int) -> None:
    for entry in entries:
        if entry.offset + entry.extent() > size:
            raise UserError(
                f"{path}: cut off: tensor {entry.name!r} ends at byte {entry.offset + entry.extent()}, the file has "
                f"{size}; fetch it again"
            )


# ---------------------------------------------------------------------------------------------------------------- .bin


# Tuples, whose fields no opcode of a pickle can change.
class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_PICKLE_TABLE: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": sealed(_rebuild_tensor),
    "torch._utils._rebuild_parameter": sealed(_rebuild_parameter),
    "collections.OrderedDict": sealed(collections.OrderedDict),
    "torch.Size": sealed(tuple),
    # Only ever passed on in a persistent id, so their names will do.
    **{f"torch.{name}": name for name in _TORCH_STORAGES},
}


class _TensorUnpickler(RestrictedUnpickler):
    # BYTEARRAY8 allocates what it announces before it reads; torch.save, which writes protocol 2, has no such opcode.
    dispatch: ClassVar = {k: load for k, load in RestrictedUnpickler.dispatch.items() if k != pickle.BYTEARRAY8[0]}


def _storage(pid: Any) -> _Storage:
    if isinstance(pid, tuple) and len(pid) == 5:
        tag, kind, key = pid[:3]
        if tag == "storage" and isinstance(kind, str) and kind in _TORCH_STORAGES and isinstance(key, str):
            return _Storage(key, np.dtype(_TORCH_STORAGES[kind]))
    raise pickle.UnpicklingError("an unknown persistent id")


def read_torch_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one ``.bin`` / ``.pt`` / ``.pth`` file written by ``torch.save`` (zip format).

    Leaves that are no tensors (step counters, flags) are left out. Raises UserError for a truncated file, for the
    format from before PyTorch 1.6, for compressed or big-endian members, and for a pickle that asks for anything but
    tensors.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: not a whole zip archive: either cut off, or written by torch.save before PyTorch 1.6; "
            "fetch it again, or re-save it as safetensors"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path}: no torch.save archive: expected one data.pkl inside, found {len(pickles)}")
            root = pickles[0].removesuffix("data.pkl")
            if members[pickles[0]].file_size > _MAX_PICKLE:
                raise UserError(
                    f"{path}: data.pkl of {members[pickles[0]].file_size} bytes is too large to be a list of tensors"
                )
            order = members.get(root + "byteorder")
            if order and (order.file_size > _MAX_BYTEORDER or archive.read(order) != b"little"):
                raise UserError(f"{path}: written on a big-endian machine; re-save it as safetensors")
            data = io.BytesIO(archive.read(pickles[0]))
            tensors = list(_tensors(_TensorUnpickler(data, _PICKLE_TABLE, persistent_load=_storage).load()))
    except UserError:
        raise
    except ForbiddenGlobal as error:
        raise UserError(
            f"{path}: refused: {error}, which a file of weights has no need of; it was not run. "
            "If you trust the file, re-save its state_dict as safetensors where it came from"
        ) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: the archive is damaged ({type(error).__name__}: {error}); fetch it again") from None

    entries = {}
    with path.open("rb") as file:
        for name, tensor in tensors:
            member = members.get(f"{root}data/{tensor.storage.key}")
            if member is None:
                raise UserError(
                    f"{path}: cut off: the storage {tensor.storage.key} of tensor {name!r} is not in the archive"
                )
            if member.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path}: the storage of {name!r} is compressed; re-save it as safetensors")
            offset = _member_offset(path, file, member) + tensor.offset * tensor.storage.dtype.itemsize
            entry = TensorEntry(name, path, offset, tensor.storage.dtype, tensor.shape, tensor.strides)
            inside = tensor.offset * tensor.storage.dtype.itemsize + max(entry.extent(), entry.nbytes)
            one_each = len(tensor.strides) == len(tensor.shape)
            if not one_each or min((*tensor.shape, *tensor.strides, tensor.offset)) < 0 or inside > member.file_size:
                raise UserError(
                    f"{path}: tensor {name!r} of shape {tensor.shape} does not fit its storage of {member.file_size} "
                    f"bytes"
                )
            entries[name] = entry
    _check_extent(path, entries.values(), path.stat().st_size)
    return entries


def _tensors(state: Any) -> Iterator[tuple[str, _Tensor]]:
    """Name and tensor for each tensor of a state dict; wrappers such as ``{"state_dict": …}`` or ``{"module": …}`` are
    seen through."""
    if not isinstance(state, dict):
        return
    found = [(str(name), leaf) for name, leaf in state.items() if isinstance(leaf, _Tensor)]
    if found:
        yield from found
        return
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state.get(wrapper), dict):
            yield from _tensors(state[wrapper])
            return


def _member_offset(path: Path, file: io.BufferedReader, member: zipfile.ZipInfo) -> int:
    # The local header's own name and extra lengths count: torch pads the extra field to align the data to 64 bytes.
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise UserError(f"{path}: the archive is damaged at member {member.filename!r}; fetch it again")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return member.header_offset + 30 + name_length + extra_length


# -------------------------------------------------------------------------------------------------------------- folders

_HEADERS: dict[str, Callable[[Path], dict[str, TensorEntry]]] = {
    ".safetensors": read_safetensors_header,
    ".bin": read_torch_header,
    ".pt": read_torch_header,
    ".pth": read_torch_header,
}
# In the order in which transformers looks for them.
_CANDIDATES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
# A projector on its own, as LLaVA's pre-training stage writes it beside or instead of a model.
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
# PEFT's, and what LLaVA's own LoRA training lays beside it.
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE_ADAPTERS = "non_lora_trainables.bin"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint, by name, from one file or many. ``folder`` holds config and tokenizer, if there are
    any."""

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def dtype(self) -> np.dtype:
        """The dtype that most bytes are stored in, among floating ones."""
        count: collections.Counter[np.dtype] = collections.Counter()
        for entry in self.tensors.values():
            if np.issubdtype(entry.dtype, np.floating) or entry.dtype == ml_dtypes.bfloat16:
                count[entry.dtype] += entry.nbytes
        return count.most_common(1)[0][0] if count else np.dtype(np.float32)

    def config(self) -> dict[str, Any]:
        """``config.json`` of the folder, ``{}`` where there is none. Raises UserError if it is no JSON object."""
        return read_json(self.folder / "config.json") if (self.folder / "config.json").is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 100 MB; raises UserError that says what is wrong."""
    try:
        if (size := path.stat().st_size) > _MAX_HEADER:
            raise UserError(f"{path}: {size} bytes are too many for a file of settings; fetch it again")
        data = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder (single file, or shards with an index) or one file; reads headers only.

    Raises UserError: no weights there, an index that names a missing file or tensor, a tensor that two shards hold, a
    damaged file.
    """
    path = Path(path)
    if path.is_file():
        return _from_files(path.parent, [path])
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    for name in _CANDIDATES:
        candidate = path / name
        if candidate.is_file():
            return _from_index(candidate) if name.endswith(".index.json") else _from_files(path, [candidate])
    loose = sorted(file for file in path.iterdir() if file.suffix in _HEADERS and _is_shard(file))
    if len({file.suffix for file in loose}) > 1:
        loose = [file for file in loose if file.suffix == ".safetensors"]
    if loose:
        return _from_files(path, loose)
    wrapped = [path / name for name in ADAPTER_FILES if (path / name).is_file()][:1]
    if wrapped:
        return _from_files(path, [*wrapped, *(file for file in [path / _BESIDE_ADAPTERS] if file.is_file())])
    projectors = [path / name for name in PROJECTOR_FILES if (path / name).is_file()]
    if projectors:
        return _from_files(path, projectors[:1])
    raise UserError(
        f"{path}: no weights here: expected one of {', '.join(_CANDIDATES)} or shards named model-00001-of-…"
    )


def _is_shard(file: Path) -> bool:
    return file.name.startswith(("model-", "pytorch_model-")) or file.name in ("open_clip_pytorch_model.bin",)


def _from_files(folder: Path, files: list[Path]) -> Checkpoint:
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        if file.suffix not in _HEADERS:
            raise UserError(f"{file}: expected one of {', '.join(_HEADERS)}")
        for name, entry in _HEADERS[file.suffix](file).items():
            if name in tensors:
                raise UserError(
                    f"{folder}: tensor {name!r} stands in both {tensors[name].file.name} and {file.name}; remove one "
                    f"of the files"
                )
            tensors[name] = entry
    if not tensors:
        raise UserError(f"{folder}: {', '.join(file.name for file in files)} hold no tensors")
    return Checkpoint(folder, tuple(files), tensors)


def _from_index(index: Path) -> Checkpoint:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: expected a table 'weight_map' of tensor names and files")
    names = sorted(set(map(str, weight_map.values())))
    # A name from the index stays inside its folder, whatever it says.
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: names a file outside its folder: {outside[0]!r}")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"{index}: names {len(absent)} of {len(names)} files that are not there: {', '.join(absent[:5])}; fetch "
            f"them"
        )
    checkpoint = _from_files(index.parent, [index.parent / name for name in names])
    if lost := [name for name in weight_map if name not in checkpoint.tensors]:
        raise UserError(
            f"{index}: lists {len(lost)} tensors that its files do not hold: {', '.join(lost[:5])}; fetch the files "
            f"again"
        )
    held = {name: checkpoint.tensors[name].file.name for name in weight_map}
    if moved := [name for name, file in weight_map.items() if held[name] != file]:
        raise UserError(
            f"{index}: says that {moved[0]} stands in {weight_map[moved[0]]}, it stands in {held[moved[0]]}; the index "
            f"belongs to other files"
        )
    return checkpoint


def sha256(path: Path, on_bytes: Callable[[int], Any] = lambda count: None) -> str:
    """Hex digest of a file, read in pieces of 8 MiB; ``on_bytes`` hears of each, before the next one is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 23):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def forget(path: Path, until: int = 0) -> None:
    """Lets go of the first ``until`` bytes of a file in the page cache (0: of all), where the system can be told so."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, until, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class Trail:
    """How far a conversion has read its files, which it takes in the order of their paths. One who follows finds their
    pages in the cache, and lets go of them: they would otherwise take all memory that is free."""

    _STEP = 64 << 20

    def __init__(self) -> None:
        self._position = ("", 0)
        self._moved = threading.Condition()
        self._end = self._cut = False

    def has_read(self, file: str, offset: int) -> None:
        """A block at ``offset`` was read, and everything before it."""
        if (file, offset) > self._position:
            with self._moved:
                self._position = file, offset
                self._moved.notify_all()

    def finish(self) -> None:
        """Nothing more will be read."""
        with self._moved:
            self._end = True
            self._moved.notify_all()

    def cut(self) -> None:
        """Nobody needs what follows: it ends with CancelledError."""
        self._cut = True
        self.finish()

    def follow(self, path: Path) -> None:
        """Returns when a file has been read, its pages let go."""
        for offset in range(0, path.stat().st_size, self._STEP):
            self._wait(path, offset + self._STEP)
            forget(path, offset + self._STEP)
        forget(path)

    def sha256(self, path: Path) -> str:
        """The same, with the file's digest."""
        offset = forgotten = 0

        def go_on(count: int) -> None:
            nonlocal offset, forgotten
            offset += count
            self._wait(path, offset)
            if offset >= forgotten + self._STEP:
                forgotten = offset
                forget(path, offset)

        digest = sha256(path, go_on)
        forget(path)
        return digest

    def _wait(self, path: Path, offset: int) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self._end or (str(path), offset) <= self._position)
        if self._cut:
            raise concurrent.futures.CancelledError


SUMS_FILE = "SHA256SUMS"


def read_sums(path: Path) -> dict[str, str]:
    """File names and SHA-256 digests of a list in the format of ``sha256sum``; raises UserError for anything else.

    A name that is listed in a folder counts where it is not listed by itself.
    """
    sums: dict[str, str] = {}
    in_folders: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as a list of SHA-256 sums ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64})[ \t]+\*?(.+)", line.rstrip())
        if match is None:
            raise UserError(f"{path}, line {number}: expected 64 hex digits and a file name, as sha256sum writes them")
        file = Path(match[2])  # "./name" is "name"
        (sums if file.name == str(file) else in_folders)[file.name] = match[1].lower()
    return in_folders | sums
