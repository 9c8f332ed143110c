"""Reads which form an answer must have: OpenAI's `response_format`, and the fields of vLLM's for the same purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peerd.api.errors import ApiError
from peerd.api.fields import Fields
from peerd.client.grammars.grammar import Grammar

_TYPES = ("text", "json_object", "json_schema", "regex", "grammar")
_MOST_CHOICES = 1024


@dataclass(frozen=True, slots=True)
class AskedGrammar:
    """The grammar of an answer, and the field that asked for it."""

    grammar: Grammar
    param: str


def read_grammar(fields: Fields) -> AskedGrammar | None:
    """The grammar that a request asks for, None if it asks for none. Raises ApiError."""
    found = [asked for asked in (_response_format(fields), *_vllm(fields)) if asked is not None]
    if len(found) > 1:
        raise fields.error(found[1].param, f"excludes {found[0].param}: an answer has one form", code="invalid_value")
    return found[0] if found else None


def _response_format(fields: Fields) -> AskedGrammar | None:
    group = fields.group("response_format")
    if group is None:
        return None
    form = group.required_text("type")
    asked: AskedGrammar | None = None
    if form not in _TYPES:
        raise group.error("type", f"must be one of {', '.join(_TYPES)}", code="invalid_value")
    if form == "json_object":
        asked = _made(group, "type", Grammar.json_object)
    if form == "json_schema":
        asked = _json_schema(group)
    if form in ("regex", "grammar"):
        asked = _FORMS[form](group, form, group.required_text(form))
    group.refuse_others()
    return asked


def _json_schema(group: Fields) -> AskedGrammar:
    inner = group.group("json_schema")
    if inner is None:
        raise group.error("json_schema", "is missing", code="missing_required_parameter")
    inner.required_text("name")
    inner.text("description")
    strict = inner.boolean("strict")
    schema = inner.take("schema")
    inner.refuse_others()
    return _schema(inner, "schema", {} if schema is None else schema, strict=strict)


def _vllm(fields: Fields) -> list[AskedGrammar | None]:
    """The forms in `structured_outputs`, and those in the fields that vLLM had before."""
    asked = [_form(fields, f"guided_{name}", name) for name in _FORMS]
    group = fields.group("structured_outputs")
    if group is not None:
        asked += [_form(group, name, name) for name in _FORMS]
        if group.boolean("json_object"):
            asked.append(_made(group, "json_object", Grammar.json_object))
        group.refuse_others()
    return asked


def _form(fields: Fields, name: str, form: str) -> AskedGrammar | None:
    value = fields.take(name)
    return None if value is None else _FORMS[form](fields, name, value)


def _schema(fields: Fields, name: str, value: Any, *, strict: bool = False) -> AskedGrammar:
    if not isinstance(value, dict | bool):
        raise fields.error(name, "must be a JSON schema, an object", code="invalid_value")
    return _made(fields, name, lambda: Grammar.json_schema(value, strict=strict))


def _regex(fields: Fields, name: str, value: Any) -> AskedGrammar:
    return _made(fields, name, lambda: Grammar.regex(_text(fields, name, value)))


def _choice(fields: Fields, name: str, value: Any) -> AskedGrammar:
    if not isinstance(value, list) or not 0 < len(value) <= _MOST_CHOICES:
        raise fields.error(name, f"must be a list of 1 to {_MOST_CHOICES} strings", code="invalid_value")
    return _made(fields, name, lambda: Grammar.choice([_text(fields, name, each) for each in value]))


def _grammar(fields: Fields, name: str, value: Any) -> AskedGrammar:
    return _made(fields, name, lambda: Grammar.ebnf(_text(fields, name, value)))


def _text(fields: Fields, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise fields.error(name, "must be a string, and not empty", code="invalid_value")
    return value


def _made(fields: Fields, name: str, make: Callable[[], Grammar]) -> AskedGrammar:
    try:
        return AskedGrammar(make(), fields.path_of(name))
    except ValueError as error:
        raise fields.error(name, str(error), code="invalid_value") from None


_FORMS: dict[str, Callable[[Fields, str, Any], AskedGrammar]] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}


def refused(asked: AskedGrammar, problem: str) -> ApiError:
    """The error for a grammar that cannot be used."""
    return ApiError(400, f"{asked.param} cannot be used: {problem}", param=asked.param, code="invalid_value")
