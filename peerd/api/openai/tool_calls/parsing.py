"""Turns the text between the marks of a form into calls. Each function knows one form."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peerd.api.openai.tool_calls.call import Call, Schemas, call_of, loaded, made
from peerd.api.openai.tool_calls.typed_values import typed
from peerd.api.strict_json import BadJson, decode_first

_SPACE = re.compile(r"\s*")
_MISTRAL_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*(?=\{)")
_DEEPSEEK_MARKS = tuple(f"<\uff5ctool\u2581{name}\uff5c>" for name in ("call\u2581begin", "sep", "call\u2581end"))
_NAME = re.compile(r"[^\s<>{}]+")
_FENCED = re.compile(r"([^\n]+)\n```json\n(.*?)\n?```\s*", re.DOTALL)
_GLM_NAME = re.compile(r"\s*([^\s<]+)\s*")
_GLM_MARKS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_XML_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*", re.DOTALL)
_XML_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def parse_hermes(body: str, schemas: Schemas) -> Sequence[Call] | None:
    """`{"name": ..., "arguments": {...}}`, or a list of such."""
    value = loaded(body)
    return _all([call_of(each, "arguments") for each in (value if isinstance(value, list) else [value])])


def parse_llama(body: str, schemas: Schemas) -> Sequence[Call] | None:
    """`{"name": ..., "parameters": {...}}`, several of them with semicolons between. Only offered tools are called,
    since an answer may be JSON that is no call.
    """
    calls, rest = [], body.strip()
    while rest:
        try:
            value, end = decode_first(rest)
        except BadJson:
            return None
        has_parameters = isinstance(value, dict) and "parameters" in value
        calls.append(call_of(value, "parameters" if has_parameters else "arguments"))
        rest = rest[end:].lstrip(" \n\t;")
    found = _all(calls)
    return found if found and all(call.name in schemas for call in found) else None


def parse_mistral(body: str, schemas: Schemas) -> Sequence[Call] | None:
    """`[{"name": ..., "arguments": {...}}, ...]`, or, in newer models, `NAME[ARGS]{...}`, each after its own mark."""
    calls: list[Call | None] = []
    for part in body.split("[TOOL_CALLS]"):
        if part.lstrip().startswith("["):
            calls += parse_hermes(part, schemas) or [None]
            continue
        named = _MISTRAL_NAMED.match(part)
        calls.append(made(named[1], loaded(part[named.end() :])) if named else None)
    return _all(calls)


def parse_deepseek(body: str, schemas: Schemas) -> Sequence[Call] | None:
    """`NAME<sep>{...}`, or, in older models, `function<sep>NAME` and the arguments in a fence; each in its marks."""
    begin, separator, end = _DEEPSEEK_MARKS
    calls: list[Call | None] = []
    at = _end_of_space(body)
    while at < len(body):
        name, at = _between(body, at, begin, separator)
        arguments, at = _between(body, at, "", end)
        if name is None or arguments is None:
            return None
        if name.strip() == "function" and "function" not in schemas:
            # Only in the older form does this word stand where the name is in the newer one.
            fenced = _FENCED.fullmatch(arguments)
            name, arguments = (fenced[1], fenced[2]) if fenced else ("", "")
        calls.append(made(name.strip(), loaded(arguments)) if _NAME.fullmatch(name.strip()) else None)
        at = _end_of_space(body, at)
    return _all(calls)


def parse_glm(body: str, schemas: Schemas) -> Sequence[Call] | None:
    """`NAME`, and then each argument as `<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>`. A word without arguments
    is a call only of a tool that was offered.
    """
    begun = _GLM_NAME.match(body)
    if begun is None:
        return None
    name, at = begun[1], begun.end()
    pairs: dict[str, str] = {}
    key_begin, key_end, value_begin, value_end = _GLM_MARKS
    while at < len(body):
        key, at = _between(body, at, key_begin, key_end)
        value, at = _between(body, _end_of_space(body, max(at, 0)), value_begin, value_end)
        if key is None or value is None:
            return None
        pairs[key.strip()] = value
        at = _end_of_space(body, at)
    if not pairs and name not in schemas:
        return None
    return _all([made(name, typed(pairs, schemas.get(name, {})))])


def parse_xml(body: str, schemas: Schemas) -> Sequence[Call] | None:
    """`<function=NAME>`, and in it each argument as `<parameter=KEY>VALUE</parameter>`."""
    function = _XML_FUNCTION.fullmatch(body)
    if function is None:
        return None
    pairs = _pairs(_XML_PARAMETER, function[2])
    return None if pairs is None else _all([made(function[1], typed(pairs, schemas.get(function[1], {})))])


def _all(calls: Sequence[Call | None]) -> Sequence[Call] | None:
    """These calls; None if one of them is none."""
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _pairs(pattern: re.Pattern[str], text: str) -> dict[str, str] | None:
    """The keys and values of which the text consists; None if it has anything else."""
    pairs: dict[str, str] = {}
    place = _end_of_space(text)
    while place < len(text):
        found = pattern.match(text, place)
        if found is None:
            return None
        pairs[found[1].strip()] = found[2]
        place = found.end()
    return pairs


def _between(text: str, at: int, begin: str, end: str) -> tuple[str | None, int]:
    """The text from `begin`, which must be there at this place, to the next `end`; and the place behind that. None, and
    the place -1, if there is no such text.
    """
    if at < 0 or not text.startswith(begin, at):
        return None, -1
    start = at + len(begin)
    stop = text.find(end, start)
    return (None, -1) if stop < 0 else (text[start:stop], stop + len(end))


def _end_of_space(text: str, at: int = 0) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at
