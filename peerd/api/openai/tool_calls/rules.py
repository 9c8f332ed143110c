"""Writes grammars for answers that think first, that must call a tool, or that call a tool or have a certain form.

The rules are in Lark's syntax as llguidance reads it. There `<name>` is a special token; a mark that is none is text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from peerd.api.openai.tool_calls.forms import Form
from peerd.api.openai.tool_calls.thoughts import THINK_MARKS
from peerd.client.grammars.grammar import Grammar, with_options

_SPACE = r"SPACE: /[ \n]{1,16}/"
# How the forms whose calls are JSON write one: what comes before it and behind it, and the name of the arguments.
_JSON_FORMS = {"hermes": ("<tool_call>", "</tool_call>", "arguments"), "llama": ("", "", "parameters")}
# Forms whose answers may have several calls, one after the other.
_SEVERAL = ("hermes",)


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls that an answer may have, or must. `schemas`: of the tools that may be called."""

    form: Form
    schemas: Mapping[str, Mapping[str, Any]]
    several: bool

    @property
    def can_be_forced(self) -> bool:
        """Whether there is a grammar of this form."""
        return self.form.name in _JSON_FORMS


@dataclass(frozen=True, slots=True)
class Thinking:
    """How an answer may begin. `may_think`: with a thought; `begins_inside`: it begins in one. `channels`: it is in
    gpt-oss's channels.
    """

    may_think: bool
    begins_inside: bool
    channels: bool


def answer_grammar(
    form: Grammar | None, calls: Calls | None, thinking: Thinking, special: Collection[str]
) -> Grammar | None:
    """The grammar of an answer that thinks if it may, and then has this `form`, or these `calls`, or one of both.

    special: the names of the model's special tokens.
    """
    before = _before(thinking, special)
    prefix = "before " if before else ""
    if calls is None:
        return form if form is None or not before else replace(form, around=_joined("start: before @answer", before))
    rules = [*before, *_calls(calls, special)]
    if form is None:
        return Grammar.lark(_joined(f"start: {prefix}calls", rules))
    return replace(form, around=_joined(f"start: {prefix}calls | {prefix}@answer", rules))


def _joined(start: str, rules: Iterable[str]) -> str:
    """Rules in one text. What several of them need may be there more than once."""
    return "\n".join(dict.fromkeys([start, *rules]))


def _before(thinking: Thinking, special: Collection[str]) -> list[str]:
    """The rule `before`, and what it needs; none if nothing comes before an answer."""
    if thinking.channels:
        start, message, end = (_mark(f"<|{name}|>", special) for name in ("start", "message", "end"))
        channel = _mark("<|channel|>", special)
        return [
            f'before: ({channel} "analysis" {message} thought {start} "assistant")? {channel} "final" {message}',
            *_until(end, special, "<|end|>"),
        ]
    if not thinking.may_think:
        return []
    begin, end = (_mark(mark, special) for mark in THINK_MARKS)
    before = "thought SPACE?" if thinking.begins_inside else f"({begin} thought SPACE?)?"
    return [f"before: {before}", _SPACE, *_until(end, special, THINK_MARKS[1])]


def _until(end: str, special: Collection[str], name: str) -> list[str]:
    """The rule `thought`: any text up to the mark `end`."""
    if name in special:
        return [f"thought: TEXT {end}", "TEXT: /(?s:.*)/"]
    return [f"thought[suffix={end}]: /(?s:.*)/"]


def _calls(calls: Calls, special: Collection[str]) -> list[str]:
    """The rule `calls`, and what it needs."""
    begin, end, arguments = _JSON_FORMS[calls.form.name]
    marks = [_mark(mark, special) for mark in (begin, end)] if begin else ["", ""]
    several = calls.several and calls.form.name in _SEVERAL
    rules = ["calls: call (SPACE? call)*" if several else "calls: call"]
    names = [f"call_{number}" for number in range(len(calls.schemas))]
    space = "SPACE?" if begin else ""
    rules.append(f"call: {marks[0]} {space} ({' | '.join(names)}) {space} {marks[1]}")
    for rule, (name, schema) in zip(names, calls.schemas.items(), strict=True):
        written = json.dumps(with_options({"type": "object", **schema}, strict=False))
        parts = ["{", '"name"', ":", json.dumps(name), ",", f'"{arguments}"', ":"]
        opening = " SPACE? ".join(json.dumps(part) for part in parts)
        rules.append(f'{rule}: {opening} SPACE? %json {written} SPACE? "}}"')
    return [*rules, _SPACE]


def _mark(name: str, special: Collection[str]) -> str:
    return name if name in special else json.dumps(name)
