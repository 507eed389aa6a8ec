"""Checks JSON values by a JSON Schema, with the keywords that ``row.schema.json`` uses. The schema's descriptions are the words of the errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.settings import did_you_mean

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "number": (int, float),
}
_SUB = ("items",)
_LISTS = ("anyOf", "oneOf")
_TABLES = ("properties", "$defs")
_OTHER = {"$schema", "title", "description", "type", "enum", "required", "additionalProperties", "$ref"}
_SIZES = {"minItems": list, "maxItems": list, "minLength": str}


class JsonSchema:
    """A schema, as parsed JSON.

    Of draft 2020-12 it knows type, enum, properties, required, ``additionalProperties: false``, items, minItems, maxItems, minLength, anyOf, oneOf
    and ``$ref`` to ``#/$defs/…``. Raises ValueError for a schema with other keywords.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.root = schema
        _demand_known(schema)

    def check(self, value: Any) -> None:
        """Raises UserError for a value that does not fit: its place in the value, what is expected, and what was found."""
        if fault := self._fault(value, self.root, "", "JSON of another form"):
            raise UserError(fault)

    def _fault(self, value: Any, schema: Mapping[str, Any], where: str, words: str) -> str:
        """What is wrong with a value; empty if nothing is."""
        if "$ref" in schema:
            target = self.root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
            schema = {**target, **{name: rule for name, rule in schema.items() if name != "$ref"}}
        words = schema.get("description", words)
        expected = f"{where or 'the row'}: expected {words}; found {value!r:.80}"
        kind = schema.get("type")
        if kind and (not isinstance(value, _TYPES[kind]) or (kind == "number" and isinstance(value, bool))):
            return expected
        if "enum" in schema and not any(value == each and type(value) is type(each) for each in schema["enum"]):
            return expected
        for name, of in _SIZES.items():
            if name in schema and isinstance(value, of):
                size, limit = len(value), schema[name]
                if size < limit if name.startswith("min") else size > limit:
                    return f"{expected} ({size} items)" if of is list else expected
        if isinstance(value, dict) and (fault := self._field_fault(value, schema, where, words)):
            return fault
        if isinstance(value, list) and "items" in schema:
            for number, item in enumerate(value):
                if fault := self._fault(item, schema["items"], f"{where}[{number}]", words):
                    return fault
        for name in _LISTS:
            faults = [self._fault(value, each, where, words) for each in schema.get(name, ())]
            fits = faults.count("")
            if name in schema and (fits < 1 or (name == "oneOf" and fits > 1)):
                return f"{expected} ({len(value)} items)" if isinstance(value, list) else expected
        return ""

    def _field_fault(self, value: Mapping[str, Any], schema: Mapping[str, Any], where: str, words: str) -> str:
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                return f"{where or 'the row'}: the field {name!r} is missing; expected {words}"
        for name, item in value.items():
            if name in known:
                if fault := self._fault(item, known[name], f"{where}.{name}" if where else name, words):
                    return fault
            elif schema.get("additionalProperties", True) is False:
                hint = did_you_mean(name, known) or f"; its fields are {', '.join(known)}"
                return f"{where or 'the row'}: there is no field {name!r:.40}{hint}"
        return ""


def _demand_known(schema: Mapping[str, Any]) -> None:
    for name, rule in schema.items():
        if name in _SUB:
            _demand_known(rule)
        elif name in _LISTS:
            for each in rule:
                _demand_known(each)
        elif name in _TABLES:
            for each in rule.values():
                _demand_known(each)
        elif name not in _OTHER and name not in _SIZES:
            raise ValueError(f"the keyword {name!r} is not known")
