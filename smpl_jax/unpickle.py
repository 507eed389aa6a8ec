"""Reads untrusted pickles without running any code that they name.

A pickle is a program: its ``GLOBAL`` opcodes import any function, and its ``REDUCE`` opcodes call it. Here a name is looked up in a table from the
caller and never imported. A name that is not in the table ends the load with :class:`ForbiddenGlobal`. Table entries build plain data only, and
no opcode can change them.
"""

import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, ClassVar

import numpy as np


class ForbiddenGlobal(pickle.UnpicklingError):
    """The pickle uses a name that is not in the table."""

    def __init__(self, name: str):
        super().__init__(f"the pickle refers to {name}")
        self.name = name


class RestrictedUnpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """An unpickler that resolves names in a table only.

    It derives from the standard library's Python implementation, not from the one in C. It is as fast, because most of the work is a few large
    buffers. Its memo is a dictionary, so a file cannot make it allocate gigabytes, and each opcode can be replaced.

    Args:
        file: binary, with ``read`` and ``readline``.
        table: ``"module.name"`` to its replacement: a function, wrapped by :func:`sealed`, or a class from :func:`record`.
        persistent_load: resolves persistent ids (PyTorch's storages); without it they are an error.
        encoding: encoding of Python 2 strings; latin1 keeps bytes unchanged.
    """

    def __init__(
        self,
        file: IO[bytes],
        table: Mapping[str, Any],
        *,
        persistent_load: Callable[[Any], Any] | None = None,
        encoding: str = "latin1",
    ):
        super().__init__(file, encoding=encoding)
        self._table = table
        self._persistent_load = persistent_load

    def _bytearray8(self: Any) -> None:
        # The base class would allocate the announced size before it reads.
        size = int.from_bytes(self.read(8), "little")
        data = self.read(size)
        if len(data) != size:
            raise pickle.UnpicklingError("the pickle is cut off")
        self.append(bytearray(data))

    # A dictionary or set hashes its keys. A few bytes of nested tuples can take exponential time to hash, so keys are text or numbers.
    def _fill(self: Any, table: Any, items: list[Any]) -> None:
        for key, value in zip(_plain(items[::2]), items[1::2]):
            table[key] = value

    def _dict(self: Any) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(self.stack[-1], items)

    def _setitem(self: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill(self.stack[-1], [key, value])

    def _setitems(self: Any) -> None:
        items = self.pop_mark()
        self._fill(self.stack[-1], items)

    def _additems(self: Any) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_plain(items))

    def _frozenset(self: Any) -> None:
        items = self.pop_mark()  # first, because it replaces `self.append`
        self.append(frozenset(_plain(items)))

    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        pickle.BYTEARRAY8[0]: _bytearray8,
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.ADDITEMS[0]: _additems,
        pickle.FROZENSET[0]: _frozenset,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._table[f"{module}.{name}"]
        except KeyError:
            raise ForbiddenGlobal(f"{module}.{name}") from None

    def get_extension(self, code: int) -> Any:
        raise ForbiddenGlobal(f"copyreg extension {code}")  # the base class would look in a process-wide cache

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent_load is None:
            raise pickle.UnpicklingError("the pickle contains a persistent id, which is not supported")
        return self._persistent_load(pid)


def _plain(keys: list[Any]) -> list[Any]:
    """Returns the keys. Raises if one is neither text nor a number."""
    for key in keys:
        if not isinstance(key, (str, bytes, int, float, type(None))):
            raise pickle.UnpicklingError(
                f"keys must be text or numbers; the pickle has a {type(key).__name__} as a key"
            )
    return keys


class sealed:
    """Makes a function a table entry: a callable without a ``__dict__`` or a ``__setstate__`` through which a ``BUILD`` opcode could change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the pickle tries to change a function")


class PickledObject:
    """Replaces an object of a foreign class: it has the name of the class and the saved state of the object. Neither is imported or run."""

    name: str = ""
    state: Any = None

    def __init__(self, *args: Any):
        pass  # the state contains everything, so the constructor's arguments are ignored

    def __setstate__(self, state: Any) -> None:
        self.state = state


def pickled_objects(names: Iterable[str]) -> dict[str, type[PickledObject]]:
    """Table entries that turn objects of the named classes (``"module.name"``) into :class:`PickledObject`."""
    return {name: type("PickledObject", (PickledObject,), {"name": name}) for name in names}


class PickledArray:
    """A numpy array under construction. numpy's own constructors trust the shape and type in the file; this one checks
    both.

    value: an ndarray, or the list of an object array's elements. shape, order: those that the file gives.
    """

    __slots__ = ("order", "shape", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self.shape: Any = ()
        self.order: Any = "C"

    def __setstate__(self, state: Any) -> None:
        self.shape, dtype, fortran, data = state[-4:]  # an older version number may come before them
        self.order = "F" if fortran else "C"
        self.value = _array(data, dtype, self.shape, self.order)


class PickledDType:
    """A numpy dtype under construction."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *align_and_copy: Any):
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype if it is of numbers or text; ``None`` for objects."""
        if self.code in ("O", "O8", "O4"):
            return None
        if not re.fullmatch(r"[biuf][1248]|[SU][0-9]{1,4}", self.code) or self.order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(
                f"arrays must contain numbers or text; the pickle has an array of type {self.code!r}"
            )
        return np.dtype(self.order + self.code)


def numpy_table() -> dict[str, Any]:
    """Table entries for numpy arrays and scalars, under every name that numpy 1 and 2 and Python 2 and 3 have written.

    Arrays arrive as :class:`PickledArray`: take their ``value``.
    """
    functions = {
        "multiarray._reconstruct": _reconstruct,
        "multiarray.scalar": _scalar,
        "numeric._frombuffer": _from_buffer,
    }
    table: dict[str, Any] = {f"numpy.{core}.{k}": sealed(f) for core in ("core", "_core") for k, f in functions.items()}
    # Only passed to `_reconstruct` as the class to create, so their names suffice.
    for name in ("numpy.ndarray", "numpy.matrix", "numpy.matrixlib.defmatrix.matrix"):
        table[name] = name
    return table | {"numpy.dtype": sealed(PickledDType), "_codecs.encode": sealed(_encode)}


def _reconstruct(*subtype_shape_and_code: Any) -> PickledArray:
    return PickledArray()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    result = PickledArray()
    result.shape, result.order, result.value = shape, order, _array(data, dtype, shape, order)
    return result


def _scalar(dtype: Any, data: Any = b"") -> Any:
    value = _array(data, dtype, (), "C")
    return value[()] if isinstance(value, np.ndarray) else value


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"expected text in the encoding latin1; the pickle has the encoding {encoding!r}")
    return text.encode("latin1")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> Any:
    if not isinstance(dtype, PickledDType):
        raise pickle.UnpicklingError("the pickle has an array without a dtype")
    kind = dtype.dtype
    if kind is None:
        return data
    if isinstance(data, str):  # Python 2 wrote bytes as text
        data = data.encode("latin1")
    elif isinstance(data, pickle.PickleBuffer):
        data = data.raw()
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape) or order not in ("C", "F"):
        raise pickle.UnpicklingError(f"the pickle has an array of invalid shape {shape!r} or order {order!r}")
    if math.prod(shape) * kind.itemsize != len(data):
        raise pickle.UnpicklingError(f"the pickle has {len(data)} bytes for an array of {kind} and shape {shape}")
    return np.frombuffer(data, kind).reshape(shape, order=order)
