"""Turns the text between the marks of a form into calls. Each function knows one form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peerd.api.openai.tool_calls.call import Call, Schemas, call_of, loaded, made
from peerd.api.strict_json import BadJson, decode_first, decode_json

_SPACE = re.compile(r"\s*")
_MISTRAL_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*(?=\{)")
_DEEPSEEK = re.compile(
    "<\uff5ctool\u2581call\u2581begin\uff5c>(.*?)<\uff5ctool\u2581sep\uff5c>(.*?)<\uff5ctool\u2581call\u2581end\uff5c>",
    re.DOTALL,
)
_FENCED = re.compile(r"([^\n]+)\n```json\n(.*?)\n?```\s*", re.DOTALL)
_GLM_NAME = re.compile(r"\s*([^\s<]+)\s*")
_GLM_PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
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
    calls = []
    for before, after in _DEEPSEEK.findall(body):
        fenced = _FENCED.fullmatch(after)
        name, arguments = (fenced[1], fenced[2]) if fenced else (before, after)
        calls.append(made(name.strip(), loaded(arguments)) if name.strip() else None)
    return _all(calls)


def parse_glm(body: str, schemas: Schemas) -> Sequence[Call] | None:
    """`NAME`, and then each argument as `<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>`."""
    name = _GLM_NAME.match(body)
    if name is None:
        return None
    pairs = _pairs(_GLM_PAIR, body[name.end() :])
    return None if pairs is None else _all([made(name[1], _typed(pairs, schemas.get(name[1], {})))])


def parse_xml(body: str, schemas: Schemas) -> Sequence[Call] | None:
    """`<function=NAME>`, and in it each argument as `<parameter=KEY>VALUE</parameter>`."""
    function = _XML_FUNCTION.fullmatch(body)
    if function is None:
        return None
    pairs = _pairs(_XML_PARAMETER, function[2])
    return None if pairs is None else _all([made(function[1], _typed(pairs, schemas.get(function[1], {})))])


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


def _end_of_space(text: str) -> int:
    space = _SPACE.match(text)
    return space.end() if space else 0


def _typed(pairs: dict[str, str], schema: Any) -> dict[str, object]:
    """Values that are written without quotes: a text where the schema says so or where they are not JSON."""
    properties = schema.get("properties")
    known = properties if isinstance(properties, dict) else {}
    return {key: _value(text, known.get(key)) for key, text in pairs.items()}


def _value(text: str, schema: object) -> object:
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return decode_json(text)
    except BadJson:
        return text
