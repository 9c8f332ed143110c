"""Gives types to arguments that a model wrote without quotes, by the schema of the tool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from peerd.api.strict_json import BadJson, decode_json

# Definitions may refer to one another in a circle.
_MAX_DEPTH: Final = 8


def typed(pairs: Mapping[str, str], schema: Mapping[str, Any]) -> dict[str, object]:
    """Values that are written without quotes, each of a type that the schema allows. Where it allows texts alone, or
    where the value is not JSON, it is a text.
    """
    properties = schema.get("properties")
    known = properties if isinstance(properties, dict) else {}
    return {key: _value(text, _Allowed.by(known.get(key), schema)) for key, text in pairs.items()}


@dataclass(frozen=True, slots=True)
class _Allowed:
    """What a schema allows: types by their names in JSON Schema, and certain values. Nothing: anything."""

    types: frozenset[str] = frozenset()
    values: tuple[object, ...] = ()

    @classmethod
    def by(cls, schema: object, root: Any, depth: int = 0) -> _Allowed:
        """What this part of the schema `root` allows, as far as can be told."""
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:
            return cls()
        if isinstance(schema.get("$ref"), str):
            return cls.by(_referred(schema["$ref"], root), root, depth + 1)
        if isinstance(schema.get("enum"), list):
            return cls(values=tuple(schema["enum"]))
        if "const" in schema:
            return cls(values=(schema["const"],))
        types = schema.get("type")
        if types is not None:
            listed = types if isinstance(types, list) else [types]
            return cls(frozenset(each for each in listed if isinstance(each, str)))
        for name in ("anyOf", "oneOf", "allOf"):
            choices = schema.get(name)
            if isinstance(choices, list) and choices:
                found = [cls.by(choice, root, depth + 1) for choice in choices]
                types = frozenset().union(*(each.types for each in found))
                return cls(types, tuple(value for each in found for value in each.values))
        return cls()

    def takes(self, value: object) -> bool:
        """Whether it allows a value that is no text."""
        if any(value == each and type(value) is type(each) for each in self.values):
            return True
        return (not self.values and not self.types) or not self.types.isdisjoint(_types_of(value))


def _types_of(value: object) -> set[str]:
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number", "integer"} if value.is_integer() else {"number"}
        case list():
            return {"array"}
        case dict():
            return {"object"}
        case _:
            return set()


def _referred(reference: str, root: Any) -> object:
    """The definition that `#/$defs/NAME` names."""
    found: object = root
    for name in reference.removeprefix("#/").split("/"):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _value(text: str, allowed: _Allowed) -> object:
    if text in allowed.values:
        return text
    try:
        value = decode_json(text)
    except BadJson:
        return text
    if isinstance(value, str):
        # Quotes belong to the text where texts are written without them.
        return text if "string" in allowed.types else value
    return value if allowed.takes(value) else text
