"""Reads files from strangers: pickles, npz, JSON, tars and image headers.

Nothing in a file is run, nothing is extracted to disk, and nothing is unpacked beyond a limit. Every fault is a UserError that begins with the
file's name, so a reader can catch it and continue with the next item.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from chatpose_jax.errors import UserError
from chatpose_jax.processing.images import FORMATS
from smpl_jax.unpickle import (
    ForbiddenGlobal,
    PickledArray,
    PickledObject,
    RestrictedUnpickler,
    numpy_table,
    pickled_objects,
    sealed,
)

MAX_MEMBER = 2**28
"""Bytes of one member of a tar, one line of JSON lines, or one pickle."""
MAX_FILE = 2**33
"""Bytes of one file when unpacked, for example of the arrays taken from an npz."""
MAX_JSON = 2**29
"""Bytes of one JSON text, which becomes many times larger in memory."""
MAX_VALUES = 10**7
"""Values in a pickle, where one that occurs twice counts twice; an array of numbers is one value. Also its opcodes, which make them."""

# Pickles ---------------------------------------------------------------------------------------------------------------------------------------


def load_pickle(data: bytes, where: object, limit: int = MAX_MEMBER, classes: Collection[str] = ()) -> Any:
    """Reads a pickle of plain Python and NumPy values, of any protocol, and of Python 2 (whose strings are read as latin1).

    Args:
        data: the pickle.
        where: begins the errors, such as the name of the file.
        limit: the most bytes that ``data`` may have.
        classes: names, ``"module.name"``, of foreign classes. Of their objects the state is read, mostly the dictionary of attributes.

    Returns:
        None, numbers, text, bytes, lists, tuples, dictionaries, sets, NumPy scalars, and NumPy arrays of numbers, text or objects, nested
        in any way. Arrays of numbers may be read-only.

    Raises:
        UserError: the pickle is cut off or damaged, is too large, contains itself, or names anything else. Nothing of it has been run.
    """
    if len(data) > limit:
        raise UserError(f"{where}: the pickle has {len(data):,} bytes; the limit is {limit:,}")
    return _unpickle(io.BytesIO(data), where, classes)


def _unpickle(file: IO[bytes], where: object, classes: Collection[str] = ()) -> Any:
    try:
        return _Plain()(_Bounded(file, _table() | pickled_objects(classes)).load())
    except ForbiddenGlobal as error:
        raise UserError(
            f"{where}: {error}, and only plain Python and NumPy values are read; nothing was run. "
            "Get the file from its official source again, or save it as plain arrays"
        ) from None
    except Exception as error:  # the opcodes of a damaged pickle can fail in any way
        detail = str(error) or type(error).__name__
        raise UserError(f"{where}: the pickle is damaged or cut off ({detail:.200})") from None


class _Bounded(RestrictedUnpickler):
    """Gives up after ``MAX_VALUES`` opcodes: one byte of a pickle can make an object of sixty."""

    def __init__(self, file: IO[bytes], table: dict[str, Any]) -> None:
        super().__init__(file, table)
        self.dispatch = _Counted(self.dispatch)  # type: ignore[misc]


class _Counted(dict):  # type: ignore[type-arg]
    """A table of opcodes that can be used so often."""

    used = 0

    def __getitem__(self, key: int) -> Any:
        self.used += 1
        if self.used > MAX_VALUES:
            raise pickle.UnpicklingError(f"it has more than {MAX_VALUES:,} opcodes")
        return super().__getitem__(key)


def _table() -> dict[str, Any]:
    """The names that a pickle of plain values may use. Made anew for each file."""
    functions: dict[str, Callable[..., Any]] = {
        "set": _set,
        "frozenset": _frozenset,
        "bytes": _bytes,
        "bytearray": _bytes,
    }
    table = numpy_table() | {
        f"{module}.{name}": sealed(function)
        for module in ("builtins", "__builtin__")
        for name, function in functions.items()
    }
    return table | {"collections.OrderedDict": sealed(_dict)}


def _set(items: Any = ()) -> set[Any]:
    if not all(isinstance(item, (str, bytes, int, float, type(None))) for item in items):
        raise pickle.UnpicklingError("it holds a set of something other than text and numbers")
    return set(items)


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(items))


def _bytes(data: Any = b"", encoding: Any = "latin1") -> bytes:
    # An integer here would ask for that many zeros.
    if isinstance(data, str) and encoding in ("latin1", "latin-1"):
        return data.encode("latin1")
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError(f"it makes bytes of a {type(data).__name__}")
    return bytes(data)


def _dict(*nothing: Any) -> dict[Any, Any]:
    if nothing:
        raise pickle.UnpicklingError("it makes an OrderedDict of arguments")
    return {}


class _Plain:
    """Turns what the unpickler made into plain values, each once, and counts them as often as they occur."""

    def __init__(self) -> None:
        self.done: dict[
            int, tuple[Any, int, Any]
        ] = {}  # by id: value, count, and the original, which keeps its id taken

    def __call__(self, value: Any) -> Any:
        return self._visit(value)[0]

    def _visit(self, value: Any) -> tuple[Any, int]:
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | bytearray | np.generic):
            return value, 1
        if id(value) in self.done:
            result, count, _ = self.done[id(value)]
            if not count:
                raise pickle.UnpicklingError("it contains itself")
            return result, count
        self.done[id(value)] = value, 0, value
        result, count = self._children(value)
        if count > MAX_VALUES:
            raise pickle.UnpicklingError(f"it has more than {MAX_VALUES:,} values")
        self.done[id(value)] = result, count, value
        return result, count

    def _children(self, value: Any) -> tuple[Any, int]:
        make: Callable[[list[Any]], Any]
        if isinstance(value, PickledArray):
            if isinstance(value.value, np.ndarray):
                return value.value, 1
            if not isinstance(value.value, list):
                raise pickle.UnpicklingError("it holds an array without contents")
            children, make = value.value, lambda items: _object_array(items, value.shape, value.order)
        elif isinstance(value, PickledObject):
            children, make = [value.state], lambda items: items[0]
        elif isinstance(value, dict):
            children, make = list(value.values()), lambda items: dict(zip(value, items))
        elif isinstance(value, list | tuple | set | frozenset):
            children, make = list(value), type(value)
        else:
            raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")
        found = [self._visit(child) for child in children]
        return make([item for item, _ in found]), 1 + sum(count for _, count in found)


def _object_array(items: list[Any], shape: Any, order: Any) -> np.ndarray:
    fits = isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
    if not fits or math.prod(shape) != len(items) or order not in ("C", "F"):
        raise pickle.UnpicklingError(f"it promises objects of shape {shape!r:.60} and holds {len(items)}")
    flat = np.empty(len(items), object)
    for i, item in enumerate(items):
        flat[i] = item
    return flat.reshape(shape, order=order)


# Names of files --------------------------------------------------------------------------------------------------------------------------------


def inside(folder: Path, name: object) -> Path:
    """The path of a file that a data set names, relative to a folder. It need not be there.

    name: text, or bytes of UTF-8; with "/" or "\\" between its parts.

    Raises UserError for a name that leads out of the folder, or is none.
    """
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    if not text or _leads_out(text):
        raise UserError(f"expected the name of a file inside {folder}, found {text!r:.120}")
    return folder.joinpath(*re.split(r"[/\\]", text))


def _leads_out(name: str) -> bool:
    parts = re.split(r"[/\\]", name)
    return parts[0] == "" or ".." in parts or bool(re.match("[A-Za-z]:", name)) or "\0" in name


# npz ---------------------------------------------------------------------------------------------------------------------------------------------


def load_npz(
    source: Path | bytes, names: Collection[str] | None = None, where: object = "", limit: int = MAX_FILE
) -> dict[str, np.ndarray]:
    """Reads arrays of an ``.npz``. Arrays of objects are read as ``load_pickle`` reads them.

    Args:
        source: the file, or its bytes.
        names: the arrays to read; those that are not there are left out. None reads all.
        where: begins the errors; by default the path.
        limit: the most bytes that these arrays may have when unpacked.

    Raises:
        UserError: there is no such file, it is no npz, it is cut off, or it is too large.
    """
    where = where or source if isinstance(source, Path) else where or "the npz"
    try:
        with zipfile.ZipFile(source if isinstance(source, Path) else io.BytesIO(source)) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = {name: info for name, info in members.items() if names is None or name in names}
            total = sum(info.file_size for info in wanted.values())
            if total > limit:
                raise UserError(
                    f"{where}: {', '.join(wanted):.200} would unpack to {total:,} bytes; the limit is {limit:,}"
                )
            arrays = {}
            for name, info in wanted.items():
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise UserError(
                        f"{where}: {name:.120} is packed in a way that NumPy does not write"
                    )  # and has no bound
                with archive.open(info) as member:
                    arrays[name] = _npy(member, info.file_size, f"{where}: {name}")
            return arrays
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # zipfile, zlib and numpy's header each raise their own
        raise UserError(f"{where}: expected an .npz, found other, damaged or cut off ({error!s:.200})") from None


def _npy(file: IO[bytes], size: int, where: str) -> np.ndarray:
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in headers:
        raise UserError(f"{where}: an array of npy version {version}; expected 1.0 or 2.0")
    shape, fortran, dtype = headers[version](file)
    if dtype.hasobject:
        value = _unpickle(io.BytesIO(file.read()), where)
        if not isinstance(value, np.ndarray) or value.shape != shape:
            raise UserError(f"{where}: promises objects of shape {shape} and holds something else")
        return value
    held = size - file.tell()
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != held:
        raise UserError(f"{where}: promises {dtype} of shape {shape} and holds {held:,} bytes")
    data = bytearray(held)  # filled in place, so that it is in memory only once and can be written to
    view, at = memoryview(data), 0
    while at < held and (more := file.readinto(view[at:])):  # type: ignore[attr-defined]
        at += more
    if at < held:
        raise UserError(f"{where}: is cut off after {at:,} of {held:,} bytes")
    if (
        dtype.kind == "U"
        and held
        and np.frombuffer(data, np.dtype(np.uint32).newbyteorder(dtype.byteorder)).max() > 0x10FFFF
    ):
        raise UserError(f"{where}: holds bytes that are no text")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


# JSON --------------------------------------------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, limit: int = MAX_FILE) -> bytes:
    """The contents of a file; of a gzip file, what it unpacks to. Raises UserError if that is more than ``limit`` bytes, or cannot be read."""
    with open_bytes(path) as file:
        try:
            data = file.read(limit + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: is damaged or cut off ({error})") from None
    if len(data) > limit:
        raise UserError(f"{path}: has more than {limit:,} bytes, which is the limit")
    return data


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file, or what a gzip file unpacks to. Raises UserError if it cannot be opened."""
    try:
        file = path.open("rb")
        magic = file.read(2)
        file.seek(0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file  # type: ignore[return-value]


def parse_json(data: bytes, where: object) -> Any:
    """Parses JSON. Raises UserError, which begins with ``where``."""
    try:
        return json.loads(data)
    except RecursionError:
        raise UserError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:  # also for bytes that are no text
        raise UserError(f"{where}: expected JSON ({error!s:.200})") from None


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """Reads a JSON file, which may be packed by gzip. Raises UserError for no file, more than ``limit`` bytes unpacked, or no JSON."""
    return parse_json(read_bytes(path, limit), path)


def read_lines(path: Path, limit: int = MAX_MEMBER) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSON lines file that are not blank, each with its number from 1 on; ``parse_json`` is the next step.

    Raises UserError for a file that cannot be read or is cut off, or a line of more than ``limit`` bytes.
    """
    with open_bytes(path) as file:
        number = 0
        while True:
            number += 1
            try:
                line = file.readline(limit + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: is damaged or cut off in line {number} ({error})") from None
            if not line:
                return
            if len(line) > limit:
                raise UserError(f"{path}: line {number} has more than {limit:,} bytes, which is the limit")
            if line.strip():
                yield number, line


# Tars --------------------------------------------------------------------------------------------------------------------------------------------

_BLOCK = 512


def tar_members(
    path: Path,
    wanted: Callable[[str], bool] = lambda name: True,
    *,
    limit: int = MAX_MEMBER,
    total: int = 2**37,
) -> Iterator[tuple[str, bytes]]:
    """The files in a tar, as (name, contents) in their order. Nothing is written to disk.

    Args:
        path: a tar that is not compressed.
        wanted: says by its name whether a file is read. All others are passed over.
        limit: the most bytes of one file. total: the most bytes of all files together.

    Raises:
        UserError: the tar is cut off or damaged. Or it holds a link, a device, a sparse file, or a name that leads out of its folder (from
            "/" on or with ".."); whoever made such a tar did not mean it as data.
    """
    try:
        with _BoundedFile(path) as file, tarfile.TarFile(fileobj=file) as tar:
            read = 0
            while (info := file.header(tar)) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all headers
                _check_member(info, path)
                if not info.isreg() or not wanted(info.name):
                    continue
                read += info.size
                for what, size, most in ((info.name, info.size, limit), ("all files together", read, total)):
                    if size > most:
                        raise UserError(f"{path}: {what:.120} would take {size:,} bytes; the limit is {most:,}")
                contents = tar.extractfile(info)
                assert contents is not None
                yield info.name, contents.read()
            # tarfile takes a damaged or missing header for the end.
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("there is no mark of the end")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged header can fail in any way
        raise UserError(f"{path}: the tar is cut off or damaged ({error}); download it again") from None


class _BoundedFile(io.FileIO):
    """Refuses to read very much at once. tarfile believes the sizes of its extended headers, and takes long to parse large ones."""

    most = MAX_MEMBER

    def header(self, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        self.most = 2**16
        info = tar.next()
        self.most = MAX_MEMBER
        return info

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= self.most:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return super().read(size)


def _check_member(info: tarfile.TarInfo, path: Path) -> None:
    if info.size < 0:  # tarfile would go back and read the same header again, without end
        raise UserError(f"{path}: {info.name!r:.120} has a size of {info.size} bytes")
    if _leads_out(info.name):
        raise UserError(
            f"{path}: the name {info.name!r:.120} leads out of the tar's own folder; no data set needs that"
        )
    if info.issparse() or not (info.isreg() or info.isdir()):
        raise UserError(
            f"{path}: {info.name!r:.120} is a link, a device or a sparse file; expected files and folders only"
        )


def tar_samples(
    path: Path, suffixes: Collection[str], *, limit: int = MAX_MEMBER
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar of webdataset: neighbouring files whose names are equal up to the first dot of the last part.

    Args:
        path: the tar. suffixes: what follows that dot, in small letters, of the files to read. limit: the most bytes of one file.

    Yields:
        The key (the common name), and the contents by suffix.

    Raises:
        UserError as ``tar_members``; also for two files of one name.
    """
    key: str | None = None
    files: dict[str, bytes] = {}
    for name, contents in tar_members(path, lambda name: _split(name)[1] in suffixes, limit=limit):
        found, suffix = _split(name)
        if found != key:
            if key is not None:
                yield key, files
            key, files = found, {}
        if suffix in files:
            raise UserError(f"{path}: two files are named {name!r:.120}")
        files[suffix] = contents
    if key is not None:
        yield key, files


def _split(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}", suffix.lower()) if stem else (name, "")  # hidden files belong to no sample


# Images ------------------------------------------------------------------------------------------------------------------------------------------


def image_size(data: bytes, where: object) -> tuple[int, int]:
    """(width, height) in pixels as stored, from the header of an encoded image. It is not decoded, and its EXIF orientation is not applied.

    Raises UserError for what is no image, or has more pixels than Pillow considers safe.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: would unpack to too many pixels ({error})") from None
    except Exception as error:  # a damaged header can fail in any way
        why = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({error!s:.120})"
        raise UserError(
            f"{where}: expected an image ({', '.join(FORMATS)}), found other or damaged bytes{why}"
        ) from None
    most = Image.MAX_IMAGE_PIXELS
    if min(width, height) < 1 or (most is not None and width * height > most):
        raise UserError(f"{where}: has {width} × {height} pixels; expected 1 to {most}")
    return width, height
