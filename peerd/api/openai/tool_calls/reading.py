"""How the answers of a model are read: for thoughts, for calls, for both, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from peerd.api.openai.tool_calls.call import Reader, Schemas
from peerd.api.openai.tool_calls.forms import Form
from peerd.api.openai.tool_calls.thoughts import THINK_MARKS, ThoughtReader


@dataclass(frozen=True, slots=True)
class Reading:
    """`make_reader` makes a reader for an answer. The tokens in `marks` must be shown in its text though they may be
    special ones.
    """

    make_reader: Callable[[], Reader]
    marks: tuple[str, ...]


def reading_of(template: str, form: Form | None, schemas: Schemas | None, *, begins_inside: bool) -> Reading | None:
    """How answers to a prompt in this template are read. None if they are plain text.

    form: of calls, if the template has one. schemas: of the tools that were offered, None for none. begins_inside:
    whether the prompt leaves a thought open.
    """
    if form is not None and form.name == "harmony":
        # All that it says is in channels.
        return Reading(partial(form.reader, schemas or {}), form.marks)
    calls = None if form is None or schemas is None else Reading(partial(form.reader, schemas), form.marks)
    if not any(mark in template for mark in THINK_MARKS):
        return calls
    if calls is None:
        return Reading(partial(ThoughtReader, None, begins_inside=begins_inside), THINK_MARKS)
    make_calls = calls.make_reader
    return Reading(lambda: ThoughtReader(make_calls(), begins_inside=begins_inside), calls.marks + THINK_MARKS)
