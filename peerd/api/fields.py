"""Reads the fields of a JSON request one by one, and names the one that is wrong.

It checks types and ranges. A field that is null counts as left out, as in OpenAI's API.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any

import trio
from starlette.requests import Request

from peerd.api.errors import ApiError, invalid
from peerd.api.strict_json import BadJson, decode_json

# A body may have this many bytes for each position of the longest context: a token has four or five, and is several
# times as long where a program escapes every letter as \uXXXX.
_BYTES_A_POSITION = 64
# But at least this many, for lists of prompts; and at most this many, for the event loop waits while JSON is parsed.
_LEAST_BODY_BYTES = 2 * 1024 * 1024
_MOST_BODY_BYTES = 8 * 1024 * 1024
# A whole body has this long to come.
_BODY_S = 60.0


def body_limit(contexts: Iterable[int]) -> int:
    """How many bytes a request may have, by the contexts of the models that are offered."""
    wanted = _BYTES_A_POSITION * max(contexts, default=0)
    return min(max(wanted, _LEAST_BODY_BYTES), _MOST_BODY_BYTES)


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request. Raises ApiError if it has more than `limit` bytes, or does not come."""
    body = bytearray()
    with trio.move_on_after(_BODY_S) as patience:
        async with aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > limit:
                    raise ApiError(413, f"the body has more than {limit} bytes, the most that the models here can use")
    if patience.cancelled_caught:
        raise ApiError(408, f"the body did not come within {_BODY_S:g} s", headers={"Connection": "close"})
    return bytes(body)


def parse_json(body: bytes) -> Fields:
    """The fields of a body. Raises ApiError if it is not a JSON object."""
    try:
        value = decode_json(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8, from byte {error.start} on") from None
    except BadJson as error:
        raise invalid(f"{error.subject or 'the body'} {error}", error.path or None) from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object")
    return Fields(value)


class Fields:
    """The fields of a request. It remembers which ones were read, so that `refuse_others` finds the unknown ones."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = dict(values)
        self._path = path
        self._known: set[str] = set()

    def take(self, name: str) -> Any:
        """A field's value as it is; None if the field is missing."""
        self._known.add(name)
        return self._values.get(name)

    @property
    def path(self) -> str:
        """Where in the request this object lies; empty for the request itself."""
        return self._path.removesuffix(".")

    def names(self) -> list[str]:
        """The names of all fields."""
        return list(self._values)

    def number(self, name: str, low: float, high: float = math.inf) -> float | None:
        value: float | None = self._checked(name, _number, f"a number from {low:g} to {high:g}", low, high)
        return value

    def integer(self, name: str, low: float, high: float = math.inf) -> int | None:
        limits = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        value: int | None = self._checked(name, _integer, f"an integer {limits}", low, high)
        return value

    def boolean(self, name: str) -> bool:
        return bool(self._checked(name, lambda value: isinstance(value, bool), "true or false"))

    def text(self, name: str) -> str | None:
        value: str | None = self._checked(name, lambda value: isinstance(value, str), "a string")
        return value

    def group(self, name: str) -> Fields | None:
        """The fields of an inner object."""
        value = self._checked(name, lambda value: isinstance(value, dict), "an object")
        return None if value is None else Fields(value, f"{self._path}{name}.")

    def objects(self, name: str, most: int) -> list[Fields]:
        """The fields of each object in a list. An empty list if it is left out."""
        value = self.take(name)
        if value is not None and not (isinstance(value, list) and len(value) <= most):
            raise self.error(name, f"must be a list of at most {most} objects", code="invalid_value")
        for number, one in enumerate(value or []):
            if not isinstance(one, dict):
                raise self.error(f"{name}[{number}]", "must be an object", code="invalid_value")
        return [Fields(one, f"{self._path}{name}[{number}].") for number, one in enumerate(value or [])]

    def required_text(self, name: str) -> str:
        value = self.text(name)
        if value is None:
            raise self.error(name, "is missing", code="missing_required_parameter")
        return value

    def ignore(self, *names: str) -> None:
        """Accept fields that change nothing here."""
        self._known.update(names)

    def refuse(self, names: Mapping[str, Any]) -> None:
        """Refuse fields that would change the answer and are not supported, unless they ask for what happens anyway."""
        for name, harmless in names.items():
            value = self.take(name)
            if value is not None and not (value == harmless and isinstance(value, bool) == isinstance(harmless, bool)):
                raise self.error(name, "is not supported here: leave it out", code="unsupported_parameter")

    def refuse_others(self) -> None:
        """Refuse all fields that were not read: OpenAI's API has no such fields."""
        for name in sorted(self._values.keys() - self._known):
            raise self.error(name, "is not a known parameter", code="unknown_parameter")

    def path_of(self, name: str) -> str:
        """A field's name with those of the objects around it, as errors say it."""
        return f"{self._path}{name}"[:100]

    def error(self, name: str, problem: str, *, code: str | None = None) -> ApiError:
        """The error for a field with this problem."""
        path = self.path_of(name)
        return invalid(f"{path} {problem}", path, code=code)

    def _checked(self, name: str, check: Callable[..., bool], wanted: str, *limits: float) -> Any:
        value = self.take(name)
        if value is not None and not check(value, *limits):
            raise self.error(name, f"must be {wanted}", code="invalid_value")
        return value


def _number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _integer(value: object, low: float, high: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
