"""Checks JSON values by JSON Schema, the part of it that this server's requests need, with errors that say what was expected and found, and where.

The schema that checks a request is the one that ``/openapi.json`` shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from chatpose_jax.settings import did_you_mean

Schema = Mapping[str, Any]

TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),), "boolean": (bool,), "integer": (int,), "number": (int, float), "string": (str,), "array": (list,), "object": (dict,),
}  # fmt: skip
WORDS = {
    "boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "a string", "array": "a list", "object": "an object",
}  # fmt: skip
RANGES = {"imum": "", "Length": " characters", "Items": " items"}
"""Endings of the words that bound a number or a length, and what is counted."""


class Mismatch(Exception):
    """A value that its schema forbids. where: its place. code: "invalid_value", "unknown_parameter" or "unsupported_value"."""

    def __init__(self, where: str, message: str, code: str = "invalid_value"):
        super().__init__(message)
        self.where, self.code = where, code


def check_json(value: Any, schema: Schema, where: str = "") -> None:
    """Raises Mismatch unless a JSON value fits.

    schema: of ``type`` (one or several), ``enum``, ``minimum``, ``maximum``, ``minLength``, ``maxLength``, ``items``, ``minItems``, ``maxItems``,
        ``properties``, ``required``, ``additionalProperties: false``, ``anyOf`` of different types, and ``oneOf`` of objects that differ in their
        ``type``. Other words only describe.
    """
    if "anyOf" in schema:
        schema = next((each for each in schema["anyOf"] if has_type(value, each["type"])), schema)
    if "oneOf" in schema:
        kinds = {each["properties"]["type"]["enum"][0]: each for each in schema["oneOf"]}
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            found = f"the type {shown_json(kind)}" if isinstance(kind, str) else shown_json(value)
            message = f"{where} must be an object whose type is {' or '.join(kinds)}, found {found}"
            raise Mismatch(where, message)
        schema = kinds[kind]
    if not _allowed(value, schema):
        message = f"{where or 'the body'} must be {expected(schema)}, found {shown_json(value)}"
        raise Mismatch(where, message, schema.get("x-code", "invalid_value"))
    if isinstance(value, list) and "items" in schema:
        for index, each in enumerate(value):
            check_json(each, schema["items"], f"{where}[{index}]")
    if isinstance(value, dict) and "properties" in schema:
        known, begin = schema["properties"], f"{where}." if where else ""
        for name, each in value.items():
            if name in known:
                check_json(each, known[name], begin + name)
            elif schema.get("additionalProperties") is False:
                message = f"{where or 'a request'} has no field {name!r:.100}{did_you_mean(name[:100], known)}"
                raise Mismatch((begin + name)[:100], message, "unknown_parameter")
        for name in schema.get("required", ()):
            if name not in value:
                raise Mismatch(begin + name, f"{begin}{name} is missing; it must be {expected(known[name])}")


def _allowed(value: Any, schema: Schema) -> bool:
    """Whether a value is as ``schema`` wants it, what it holds aside."""
    if "enum" in schema:
        return any(isinstance(value, bool) == isinstance(each, bool) and value == each for each in schema["enum"])
    if "anyOf" in schema or ("type" in schema and not has_type(value, schema["type"])):
        return False
    size = len(value) if isinstance(value, str | list) else value
    if isinstance(size, bool) or not isinstance(size, int | float):
        return True
    least, most = (
        [schema[f"{end}{of}"] for of in RANGES if f"{end}{of}" in schema] or [size] for end in ("min", "max")
    )
    return bool(least[0] <= size <= most[0])


def has_type(value: Any, kinds: str | list[str]) -> bool:
    """Whether a value has one of these JSON types. 1.0 is a whole number, ``true`` is none."""
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)):
            return True
        if kind == "integer" and isinstance(value, float) and value.is_integer():
            return True
    return False


def expected(schema: Schema) -> str:
    """What a schema expects, in words."""
    if "enum" in schema:
        return " or ".join(json.dumps(each) for each in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(expected(each) for each in schema["anyOf"] if each != {"type": "null"})
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    text = " or ".join(WORDS[kind] for kind in kinds if kind != "null")
    for of, unit in RANGES.items():
        least, most = schema.get(f"min{of}"), schema.get(f"max{of}")
        if most is not None:
            text += f" of {most}{unit}" if least == most else f" from {least or 0} to {most}{unit}"
    return text


def shown_json(value: Any) -> str:
    """A value as an error shows it: short, and never what a conversation or a picture holds."""
    if isinstance(value, list | dict):
        return ("a list" if isinstance(value, list) else "an object") if value else json.dumps(value)
    return json.dumps(value[:60] if isinstance(value, str) else value)[:80]
