"""Reads JSON of strangers: only what can be written as JSON again, and encoded.

Python's own reader also takes NaN, numbers that become infinite and halves of characters, each of which fails later and
far from here; and it nests as deeply as the stack that it happens to have, which is deeper than others can write.
"""

from __future__ import annotations

import json
import re
from typing import Any

# Templates and JSON schemas need a tenth of it.
MAX_DEPTH = 128
# How JSON escapes a surrogate: two of them make a character, one alone is half of one.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BadJson(ValueError):
    """Says what is wrong with a JSON text, as a predicate. `subject` is of what, if it is not the text itself; `path`
    names its place in the value.
    """

    def __init__(self, problem: str, subject: str = "", path: str = "") -> None:
        super().__init__(problem)
        self.subject = subject
        self.path = path


def decode_json(text: str) -> Any:
    """The value of a JSON text. Raises BadJson."""
    value, end = _scan(text, whole=True)
    return _checked(value, text[:end])


def decode_first(text: str) -> tuple[Any, int]:
    """The first value of a text that begins with JSON, and where it ends. Raises BadJson."""
    value, end = _scan(text, whole=False)
    return _checked(value, text[:end]), end


def _scan(text: str, *, whole: bool) -> tuple[Any, int]:
    try:
        return (_DECODER.decode(text), len(text)) if whole else _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        raise BadJson(f"is not JSON: {error}") from None
    except RecursionError:
        raise _too_deep() from None
    except BadJson:
        raise
    except ValueError:
        # Python refuses to convert them, since that takes long.
        raise BadJson("is not JSON that can be read: a number in it has thousands of digits") from None


def _checked(value: Any, text: str) -> Any:
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _refuse_depth(value)
    if _SURROGATE.search(text):
        _refuse_half_characters(value)
    return value


def _refuse_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    if level:
        raise _too_deep()


def _too_deep() -> BadJson:
    return BadJson(f"is not JSON that can be read: it is nested too deeply, in more than {MAX_DEPTH} levels")


def _refuse_half_characters(value: Any) -> None:
    """Refuse strings with half a surrogate pair: JavaScript makes them when it cuts a string inside an emoji."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        path, each = waiting.pop()
        if isinstance(each, str) and not _is_encodable(each):
            raise BadJson("has half a character (an unpaired surrogate): cut strings between characters", path, path)
        if isinstance(each, list):
            waiting += [(f"{path}[{number}]", item) for number, item in enumerate(each)]
        if isinstance(each, dict):
            if not all(map(_is_encodable, each)):
                name = f"a name in {path}" if path else "the name of a field"
                raise BadJson("has half a character (an unpaired surrogate)", name, path)
            waiting += [(f"{path}.{name}" if path else name, item) for name, item in each.items()]


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise BadJson(f"is not JSON: {name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise BadJson(f"is not JSON that can be read: {digits[:20]} is too large a number")
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
