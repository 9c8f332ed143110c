"""Thoughts are split off an answer, however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.api.openai.tool_calls.call import Call, Thought
from peerd.api.openai.tool_calls.forms import form_of
from peerd.api.openai.tool_calls.reading import reading_of

HERMES = "<tool_call>"
CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
CHANNELS = "<|channel|>analysis<|message|>2+2?<|end|><|start|>assistant<|channel|>final<|message|>4"


def read(pieces, *, inside=False, template="<think>", tools=False):
    """The thought, the text and how many calls there are in an answer that comes in these pieces."""
    reading = reading_of(template, form_of(template), {"now": {}} if tools else None, begins_inside=inside)
    reader = reading.make_reader()
    found = [each for piece in pieces for each in reader.add(piece)] + reader.add("", final=True)
    thought = "".join(each.text for each in found if isinstance(each, Thought))
    text = "".join(each for each in found if isinstance(each, str))
    return thought, text, sum(isinstance(each, Call) for each in found)


@pytest.mark.parametrize(
    ("inside", "said", "thought", "text"),
    [
        (False, "<think>\n2+2 is 4.\n</think>\n\nIt is 4.\n", "2+2 is 4.", "It is 4.\n"),
        (False, "\n<think>a</think>b", "a", "b"),
        (False, "It is 4.", "", "It is 4."),
        (False, "  4", "", "  4"),
        (False, "<thinking>4</thinking>", "", "<thinking>4</thinking>"),
        (False, "Say <think>4</think>", "", "Say <think>4</think>"),
        (False, "<think>\n\n</think>\n\n4", "", "4"),
        (False, "<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
        (False, "<think>cut off", "cut off", ""),
        (False, "<think>a < b </thin", "a < b </thin", ""),
        (True, "2+2 is 4.\n</think>\n\n4", "2+2 is 4.", "4"),
        (True, "\n<think>a</think>b", "a", "b"),
        (True, "never ends", "never ends", ""),
        (True, "", "", ""),
        (False, "<thi", "", "<thi"),
    ],
)
def test_thoughts_and_texts(inside, said, thought, text):
    assert read([said], inside=inside) == (thought, text, 0)
    assert read(said, inside=inside) == (thought, text, 0)


def test_calls_are_found_behind_thoughts_and_not_in_them():
    said = f"<think>I could {CALL}</think>\n{CALL}"
    for pieces in ([said], said):
        assert read(pieces, template=f"<think>{HERMES}", tools=True) == (f"I could {CALL}", "", 1)
    # Without tools a call is text.
    assert read([said], template=f"<think>{HERMES}") == (f"I could {CALL}", CALL, 0)


def test_channels_are_read_with_and_without_tools():
    template = "<|channel|>functions."
    for pieces in ([CHANNELS], CHANNELS):
        assert read(pieces, template=template, tools=True) == ("2+2?", "4", 0)
        assert read(pieces, template=template) == ("2+2?", "4", 0)


def test_a_template_without_marks_has_plain_answers():
    assert reading_of("{{ messages }}", None, None, begins_inside=False) is None
    assert reading_of(HERMES, form_of(HERMES), None, begins_inside=False) is None


@given(st.data())
def test_an_answer_reads_alike_however_it_is_cut(data):
    parts = st.sampled_from(["<think>", "</think>", " ", "\n", "text", "<", "</th", CALL])
    said = "".join(data.draw(st.lists(parts, max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=8)))
    pieces = [said[start:end] for start, end in zip([0, *cuts], [*cuts, len(said)], strict=True)]
    how = {"inside": data.draw(st.booleans()), "template": f"<think>{HERMES}", "tools": data.draw(st.booleans())}
    assert read(pieces, **how) == read([said], **how)
