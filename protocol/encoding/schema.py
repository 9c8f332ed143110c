"""Declares what a message's fields may hold, and checks received fields before building a message from them.

A message is a frozen dataclass whose fields carry a `Rule`. Python and msgpack are lax (`True` is an `int`, `1`
equals `1.0`), so every rule names the exact type that it accepts. Unknown fields are ignored, so that a newer peer
may add some.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeVar

from peerd.protocol.errors import RemoteProtocolError

Rule = Callable[[Any], Any]
"""Takes a decoded msgpack value and returns the field's value, or raises ValueError saying what it expects."""

_RULE, _DUMP = "rule", "dump"


def integer(low: int, high: int) -> Rule:
    def rule(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return value

    return rule


def number(low: float, high: float) -> Rule:
    def rule(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"a number from {low} to {high}")
        return float(value)

    return rule


def text(max_length: int) -> Rule:
    def rule(value: Any) -> str:
        if type(value) is not str or len(value) > max_length:
            raise ValueError(f"text of at most {max_length} characters")
        return value

    return rule


def choice(*allowed: str) -> Rule:
    def rule(value: Any) -> str:
        if type(value) is not str or value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return rule


def binary(low: int, high: int) -> Rule:
    def rule(value: Any) -> bytes:
        if type(value) is not bytes or not low <= len(value) <= high:
            raise ValueError(f"{low} to {high} bytes")
        return value

    return rule


def mapping(value: Any) -> dict[str, Any]:
    """A map whose contents the caller checks later."""
    if type(value) is not dict:
        raise ValueError("a map")
    return value


def boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def many(item: Rule, max_items: int) -> Rule:
    def rule(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple) or len(value) > max_items:
            raise ValueError(f"a list of at most {max_items}")
        return tuple(item(one) for one in value)

    return rule


def group(*items: Rule) -> Rule:
    """A list of exactly these items. Small structures travel as such lists, without field names."""

    def rule(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple) or len(value) != len(items):
            raise ValueError(f"a list of {len(items)}")
        return tuple(check(one) for check, one in zip(items, value, strict=True))

    return rule


def built(item: Rule, build: Callable[..., Any]) -> Rule:
    """Passes the values that `item` accepts to `build` as arguments."""

    def rule(value: Any) -> Any:
        return build(*item(value))

    return rule


def required(rule: Rule, dump: Callable[[Any], Any] | None = None) -> Any:
    """A field that must be present. `dump` turns its value into msgpack values."""
    return dataclasses.field(metadata={_RULE: rule, _DUMP: dump})


def optional(rule: Rule, default: Any, dump: Callable[[Any], Any] | None = None) -> Any:
    """A field that is left out on the wire when it equals `default`. `dump` turns its value into msgpack values."""
    return dataclasses.field(default=default, metadata={_RULE: rule, _DUMP: dump})


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """The base of messages: frozen dataclasses whose fields have rules. `TYPE` is the message's name on the wire."""

    TYPE: ClassVar[str] = ""

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Self:
        """Check `header` and build the message. Raises RemoteProtocolError naming the field."""
        values = {}
        for name, rule, _, default in _plan(cls):
            if name not in header:
                if default is dataclasses.MISSING:
                    raise RemoteProtocolError(f"{cls.TYPE}: {name} is missing")
                continue
            try:
                values[name] = rule(header[name])
            except ValueError as error:
                raise RemoteProtocolError(f"{cls.TYPE}: {name} must be {error}") from None
        return cls(**values)

    def to_header(self) -> dict[str, Any]:
        """The message as msgpack values, without optional fields that equal their defaults."""
        header: dict[str, Any] = {"type": self.TYPE}
        for name, _, dump, default in _plan(type(self)):
            value = getattr(self, name)
            if default is dataclasses.MISSING or value != default:
                header[name] = dump(value) if dump else value
        return header


M = TypeVar("M", bound=Message)
_Plan = list[tuple[str, Rule, Callable[[Any], Any] | None, Any]]
_plans: dict[type, _Plan] = {}


def _plan(cls: type[Message]) -> _Plan:
    # Cached: reading dataclass metadata costs more than the checks themselves, and every step needs it.
    plan = _plans.get(cls)
    if plan is None:
        fields = dataclasses.fields(cls)
        plan = [(f.name, f.metadata[_RULE], f.metadata[_DUMP], f.default) for f in fields]
        _plans[cls] = plan
    return plan


def parse(header: Mapping[str, Any], allowed: tuple[type[M], ...]) -> M:
    """Build that one of the `allowed` messages which the header's `type` names. Raises RemoteProtocolError."""
    kind = header.get("type")
    for cls in allowed:
        if kind == cls.TYPE:
            return cls.from_header(header)
    expected = ", ".join(cls.TYPE for cls in allowed)
    raise RemoteProtocolError(f"expected {expected}, got {str(kind)[:40]!r}")
