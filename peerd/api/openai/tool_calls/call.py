"""A tool call that a model wrote, and what its readers have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peerd.api.strict_json import BadJson, decode_json


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the tool `name`. `arguments`: a JSON object, as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Thought:
    """What the model thought before its answer, or a part of it."""

    text: str


Piece = str | Call | Thought
Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each offered tool's arguments, by the tool's name."""
Parse = Callable[[str, Schemas], Sequence[Call] | None]
"""Turns the text between a form's marks into calls. None if the text is no call."""


class Reader(Protocol):
    """Splits one answer into thoughts, text and calls, as the answer comes."""

    def add(self, text: str, *, final: bool = False) -> list[Piece]:
        """What became certain with this text; all that is left if it is the `final` one."""


def call_of(value: object, arguments: str) -> Call | None:
    """The call in `{"name": ..., ARGUMENTS: {...}}`. None if the value is no such object."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    given = value.get(arguments)
    if isinstance(given, str):
        # Some models write the arguments as OpenAI's API has them: as a text.
        given = loaded(given)
    if given is None:
        given = {} if value.keys() <= {"name", "id", "type"} else None
    return made(value["name"], given)


def made(name: str, arguments: object) -> Call | None:
    """A call with these arguments. None if they are not an object."""
    if not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def loaded(text: str) -> object:
    """The value that a JSON text stands for. None if it is not JSON that can be written and encoded again."""
    try:
        return decode_json(text)
    except BadJson:
        return None


def possible_beginning(text: str, marks: Sequence[str]) -> int:
    """The length of the longest end of `text` with which a mark may begin."""
    longest = max(map(len, marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
