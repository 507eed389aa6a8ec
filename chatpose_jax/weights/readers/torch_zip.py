"""Reads the zip archives of ``torch.save`` since PyTorch 1.6: ``data.pkl``, and one uncompressed member for each storage.

The unpickler accepts a dozen harmless names and refuses all others. A small file cannot make it allocate much memory.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.weights.readers.entry import TensorEntry, are_sizes, demand_inside, demand_name
from smpl_jax.unpickle import ForbiddenGlobal, RestrictedUnpickler, numpy_table, pickled_objects, sealed

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
# The data.pkl of the largest model has a few hundred kB.
_MAX_PICKLE = 16_000_000
_MAX_BYTEORDER = 16


# Tuples, whose fields no opcode of a pickle can change.
class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unread(pickle.UnpicklingError):
    """A tensor that torch can read and this module cannot."""


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> _Tensor:
    """requires_grad: not used. hooks: torch writes none. metadata: torch's lazy bits, ``neg`` and ``conj``."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    if not are_sizes(shape) or not are_sizes(strides) or not are_sizes((offset,)) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor whose sizes, strides or offset are not integers from 0 to 2^63 - 1")
    if hooks:
        raise _Unread("a tensor with backward hooks")
    if metadata:
        bits = [name for name in ("neg", "conj") if isinstance(metadata, dict) and name in metadata]
        raise _Unread(
            f"a tensor with the lazy bit {bits[0]!r}, whose stored values are not its values (.resolve_neg(), .resolve_conj())"
            if bits
            else "a tensor with metadata of an unknown kind"
        )
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Any:
    if hooks:
        raise _Unread("a parameter with backward hooks")
    return tensor


# Other names that torch writes for a tensor → what the tensor is.
_UNREAD = {
    "torch._utils._rebuild_tensor_v3": "a tensor of a newer dtype (float8, uint16 …)",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (device meta)",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device (XLA …)",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device (XLA …)",
    "torch._utils._rebuild_xla_tensor": "a tensor of another device (XLA)",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own (DTensor …)",
    "torch._tensor._rebuild_from_type_v2": "a tensor of a class, or with attributes, of its own (DTensor …)",
    "torch._utils._rebuild_parameter_with_state": "a parameter with attributes of its own",
    **{f"torch.{kind}Storage": "a complex tensor" for kind in ("ComplexFloat", "ComplexDouble")},
    **{f"torch.Q{kind}Storage": "a quantised tensor" for kind in ("Int8", "Int32", "UInt8", "UInt4x2", "UInt2x4")},
}

_PICKLE_TABLE: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": sealed(_rebuild_tensor),
    "torch._utils._rebuild_parameter": sealed(_rebuild_parameter),
    "collections.OrderedDict": sealed(lambda: collections.OrderedDict()),  # filled by other opcodes, key by key
    "torch.Size": sealed(tuple),
    # Used only in persistent ids, so the name is enough.
    **{f"torch.{name}": name for name in _TORCH_STORAGES},
}


class _TensorUnpickler(RestrictedUnpickler):
    # BYTEARRAY8 allocates its announced size before it reads. torch.save writes protocol 2, which does not have it.
    dispatch: ClassVar = {k: load for k, load in RestrictedUnpickler.dispatch.items() if k != pickle.BYTEARRAY8[0]}


def _storage(pid: Any) -> _Storage:
    if isinstance(pid, tuple) and len(pid) == 5:
        tag, kind, key = pid[:3]
        if tag == "storage" and isinstance(kind, str) and kind in _TORCH_STORAGES and isinstance(key, str):
            return _Storage(key, np.dtype(_TORCH_STORAGES[kind]))
    raise pickle.UnpicklingError("an unknown persistent id")


def read_torch_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file of ``torch.save`` (zip format). Other values are skipped. Raises UserError as ``read_torch_objects``."""
    return read_torch_objects(path)[0]


def read_torch_objects(path: Path, classes: Iterable[str] = ()) -> tuple[dict[str, TensorEntry], Any]:
    """The tensors of one file of ``torch.save``, and the value that it holds.

    classes: names, ``"module.name"``, of foreign classes whose objects may be in it. They become ``PickledObject``; numbers of NumPy may stand
    beside them.

    Raises UserError for a truncated file, the format before PyTorch 1.6, compressed or big-endian members, and a pickle that needs names other than
    those of tensors.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: not a complete zip archive: either cut off, or written by torch.save before PyTorch 1.6; "
            "fetch it again, or re-save it as safetensors"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(
                    f"{path}: not an archive of torch.save; expected one data.pkl in it, found {len(pickles)}"
                )
            root = pickles[0].removesuffix("data.pkl")
            if members[pickles[0]].file_size > _MAX_PICKLE:
                raise UserError(
                    f"{path}: data.pkl of {members[pickles[0]].file_size} bytes is too large to be a list of tensors"
                )
            order = members.get(root + "byteorder")
            if order and (order.file_size > _MAX_BYTEORDER or archive.read(order) != b"little"):
                raise UserError(f"{path}: written on a big-endian machine; re-save it as safetensors")
            data = io.BytesIO(archive.read(pickles[0]))
            table = _PICKLE_TABLE | ({**numpy_table(), **pickled_objects(classes)} if classes else {})
            value = _TensorUnpickler(data, table, persistent_load=_storage).load()
            tensors = list(_tensors(value))
    except UserError:
        raise
    except (_Unread, ForbiddenGlobal) as error:
        what = _UNREAD.get(error.name) if isinstance(error, ForbiddenGlobal) else str(error)
        if what is not None:
            raise UserError(
                f"{path}: contains {what}, which is not supported; load it in PyTorch and save its state_dict as plain tensors: "
                "{name: tensor.to(float dtype).clone() for …}, as safetensors"
            ) from None
        raise UserError(
            f"{path}: refused: {error}, which weights do not need; it was not run. "
            "If you trust the file, load it in PyTorch and save its state_dict as safetensors"
        ) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: the archive is damaged ({type(error).__name__}: {error}); fetch it again") from None

    entries = {}
    with path.open("rb") as file:
        for name, tensor in tensors:
            demand_name(path, name)
            member = members.get(f"{root}data/{tensor.storage.key}")
            if member is None:
                raise UserError(
                    f"{path}: cut off: the storage {tensor.storage.key} of tensor {name!r} is not in the archive"
                )
            if member.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path}: the storage of {name!r} is compressed; re-save it as safetensors")
            offset = _member_offset(path, file, member) + tensor.offset * tensor.storage.dtype.itemsize
            entry = TensorEntry(name, path, offset, tensor.storage.dtype, tensor.shape, tensor.strides)
            inside = tensor.offset * tensor.storage.dtype.itemsize + entry.extent()
            if inside <= member.file_size < entry.nbytes:
                raise UserError(
                    f"{path}: tensor {name!r} of shape {tensor.shape} and strides {tensor.strides} is expanded: it repeats "
                    f"the values of a storage of {member.file_size} bytes. This is not supported, because a small file could give "
                    "a tensor of any size; save tensor.contiguous() in PyTorch"
                )
            if inside > member.file_size:
                raise UserError(
                    f"{path}: tensor {name!r} of shape {tensor.shape} does not fit its storage of {member.file_size} bytes"
                )
            entries[name] = entry
    demand_inside(path, entries.values(), path.stat().st_size)
    return entries, value


def _tensors(state: Any) -> Iterator[tuple[str, _Tensor]]:
    """Name and tensor of each tensor in a state dict, which may be wrapped as ``{"state_dict": …}`` or ``{"module": …}``."""
    if not isinstance(state, dict):
        return
    if found := [(name, leaf) for name, leaf in state.items() if isinstance(leaf, _Tensor)]:
        yield from found
        return
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state.get(wrapper), dict):
            yield from _tensors(state[wrapper])
            return


def _member_offset(path: Path, file: io.BufferedReader, member: zipfile.ZipInfo) -> int:
    # The lengths are those of the local header: torch pads its extra field to align the data to 64 bytes.
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise UserError(f"{path}: the archive is damaged at member {member.filename!r}; fetch it again")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return member.header_offset + 30 + name_length + extra_length
