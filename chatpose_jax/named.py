"""Finds code by the name in a setting (a key of a table, or the user's own ``package.module:name``), and checks its options."""

from __future__ import annotations

import importlib
import inspect
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from chatpose_jax.errors import UserError
from chatpose_jax.settings import check_value, did_you_mean

_NOT_OWN = {
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    Path(__file__).parent,
    Path(__file__).parents[1] / "smpl_jax",
}


def find(where: str, name: str, table: Mapping[str, str]) -> Any:
    """The function or class with a given name.

    where: the start of error messages, such as ``data.sources[0] 'mydata:make'``.
    table: short names of code in this package -> ``package.module:name``.

    Raises UserError if there is none, or its module cannot be imported. An OSError during the import stays an OSError.
    """
    module, _, attribute = table.get(name, name).partition(":")
    if not (module and attribute):
        raise UserError(
            f"{where}: expected {' or '.join(map(repr, table))}, or 'package.module:name'{did_you_mean(name, table)}"
        )
    try:
        imported = importlib.import_module(module)
        found = getattr(imported, attribute, None)
    except ImportError as error:
        raise UserError(
            f"{where} cannot be imported: {error} (a module of your own must be installed, or be in a folder on PYTHONPATH)"
        ) from error
    except Exception as error:
        raise raised(f"{where} cannot be imported", error) from error
    if not callable(found):
        scope = vars(imported)
        what = f"; it is {found!r:.100}, of type {type(found).__name__}" if attribute in scope else ""
        near = did_you_mean(attribute, [each for each, value in scope.items() if callable(value)])
        raise UserError(f"{where}: the module {module} has no function or class {attribute!r}{what or near}")
    return found


def signature(where: str, function: Any) -> inspect.Signature:
    """The signature of a function or class, with evaluated annotations. Raises UserError if it cannot be read."""
    try:
        return inspect.signature(function, eval_str=True)
    except Exception as error:  # annotations are code
        raise UserError(f"{where}: its signature cannot be read ({type(error).__name__}: {error})") from None


def check_options(where: str, found: inspect.Signature, options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that is not a keyword-only parameter or not of the annotated type, and for a missing option.

    An option without annotation may have any value. Sequences are tuples.
    """
    parameters = found.parameters.values()
    known = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for name, value in options.items():
        if name in known:
            if (kind := known[name].annotation) is inspect.Parameter.empty:
                continue
            try:
                check_value(f"{where}: the option {name}", value, kind)
            except TypeError as error:  # isinstance does not accept the type, such as a Protocol
                raise UserError(
                    f"{where}: values cannot be checked against the annotation of its option {name} ({error})"
                ) from None
        elif not open_ended:
            hint = did_you_mean(str(name), known) or "; its options are " + (", ".join(known) or "none")
            raise UserError(f"{where} has no option {name!r}{hint}")
    if missing := [p.name for p in known.values() if p.default is p.empty and p.name not in options]:
        raise UserError(f"{where} needs the option {missing[0]!r}")


def raised(where: str, error: Exception) -> Exception:
    """The error to raise for an exception in the user's own code: one line with the place, the type and the message.

    An OSError stays an OSError with the same errno, so that callers can tell whether the run can be resumed.
    """
    if isinstance(error, UserError):
        return UserError(f"{where}: {error}")
    kind, words = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno:
        return OSError(error.errno, f"{error.strerror or words} ({where}: {kind})", error.filename)
    return UserError(f"{where}: {kind}" + (f": {words}" if words else ""))


def own_line(error: Exception) -> str:
    """The innermost line of the user's own code that an exception passed, as " (file.py:12)"; "" if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _is_own(file: str) -> bool:
    """Whether a file is neither of these packages, nor of Python or an installed package."""
    path = Path(file)
    return path.is_file() and not any(path.is_relative_to(folder) for folder in _NOT_OWN)


def rows(where: str, value: Any, kind: Any) -> tuple[Any, ...]:
    """Normalises rows that name code, as people or JSON write them: lists become tuples, omitted values get their defaults.

    kind: the NamedTuple of a row. A single name is one row.

    Raises UserError for anything that is not a row, and for a value that is not of the annotated type.
    """
    given = ((value,),) if isinstance(value, str) else value
    words = ", ".join("{option: value}" if name == "options" else name for name in kind._fields)
    expected = f"{where}: expected rows of ({words}), all but the name optional"
    if not isinstance(given, list | tuple):
        raise UserError(f"{expected}, found {value!r:.100}")
    for row in given:
        if not isinstance(row, list | tuple) or not 1 <= len(row) <= len(kind._fields):
            raise UserError(
                f"{expected}, found {row!r:.100} instead of a row; a single row needs a comma after its bracket, ((…),)"
            )
    found = tuple(kind(*map(_tuples, row)) for row in given)
    for number, row in enumerate(found):
        for name, annotation in get_type_hints(kind).items():
            check_value(f"{where}[{number}]: {name}", getattr(row, name), annotation)
    return found


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
