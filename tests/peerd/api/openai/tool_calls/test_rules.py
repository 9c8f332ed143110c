"""Grammars of answers with calls and thoughts allow what their readers find, and nothing else."""

from __future__ import annotations

import pytest

from peerd.api.openai.tool_calls.call import Call, Thought
from peerd.api.openai.tool_calls.forms import FORMS
from peerd.api.openai.tool_calls.reading import reading_of
from peerd.api.openai.tool_calls.rules import Calls, Thinking, answer_grammar
from peerd.client.grammars.grammar import Grammar
from peerd.client.grammars.vocabulary import Vocabulary

END = 256
MARKS = ("<think>", "</think>", "<tool_call>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>")
BY_NAME = {form.name: form for form in FORMS}
# References count from the root of each tool's own schema.
SCHEMAS = {
    "weather": {
        "properties": {"city": {"$ref": "#/$defs/city"}},
        "required": ["city"],
        "$defs": {"city": {"enum": ["Rome"]}},
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
PLAIN = Thinking(may_think=False, begins_inside=False, channels=False)
MAY_THINK = Thinking(may_think=True, begins_inside=False, channels=False)
INSIDE = Thinking(may_think=True, begins_inside=True, channels=False)
CHANNELS = Thinking(may_think=False, begins_inside=False, channels=True)
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
OBJECT = Grammar.json_object()
FINAL = "<|channel|>final<|message|>{}"


def calls(form="hermes", several=True, schemas=SCHEMAS):
    return Calls(BY_NAME[form], schemas, several)


def ends_of(grammar, text, special=()):
    """Whether an answer may be this text: `over` if nothing may follow it, `may end`, or how far it came."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>", *(mark.encode() for mark in MARKS)]
    special_ids = [END, *(END + 1 + MARKS.index(mark) for mark in special)]
    vocabulary = Vocabulary(tokens, special_ids, lambda part: _ids(part, ()))
    row, answer = vocabulary.compile(grammar).row([END]), _ids(text, special)
    for place, token in enumerate(answer):
        if not row.allowed(answer[:place], len(tokens))[token]:
            return place
    return "over" if row.is_over(answer) else "may end" if row.allowed(answer, len(tokens))[END] else "goes on"


def _ids(text, special):
    ids = []
    while text:
        mark = next((mark for mark in special if text.startswith(mark)), None)
        ids += [END + 1 + MARKS.index(mark)] if mark else list(text[0].encode())
        text = text[len(mark or text[0]) :]
    return ids


@pytest.mark.parametrize("special", [(), MARKS], ids=["marks are text", "marks are special tokens"])
@pytest.mark.parametrize(
    ("form", "calls", "thinking", "right"),
    [
        (None, calls(), PLAIN, [WEATHER, NOW, f"{NOW}\n{WEATHER}"]),
        (None, calls(several=False), PLAIN, [NOW]),
        (None, calls(), MAY_THINK, [NOW, f"<think>\nhm\n</think>\n\n{NOW}"]),
        (None, calls(), INSIDE, [f"hm {{</think>{NOW}"]),
        (None, calls("llama", several=False), PLAIN, ['{"name": "now", "parameters": {}}']),
        (OBJECT, calls(), PLAIN, [NOW, '{"a": 1}']),
        (OBJECT, None, MAY_THINK, ["{}", "<think>{</think>\n{}"]),
        (OBJECT, None, INSIDE, ["{}</think>{}"]),
        (OBJECT, None, PLAIN, ["{}"]),
        (OBJECT, None, CHANNELS, [FINAL, f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{FINAL}"]),
    ],
)
def test_what_an_answer_may_be(form, calls, thinking, right, special):
    grammar = answer_grammar(form, calls, thinking, special)
    for text in right:
        assert ends_of(grammar, text, special) in ("over", "may end"), text


@pytest.mark.parametrize(
    ("form", "calls", "thinking", "wrong", "place"),
    [
        (None, calls(), PLAIN, "I look.", 0),
        (None, calls(), PLAIN, '<tool_call>{"name": "rain"', 21),
        (None, calls(schemas={"now": SCHEMAS["now"]}), PLAIN, WEATHER, 22),
        (None, calls(), PLAIN, WEATHER.replace("Rome", "Oslo"), WEATHER.index("Rome")),
        (None, calls(several=False), PLAIN, NOW + NOW, len(NOW)),
        (None, calls(), INSIDE, NOW, "goes on"),
        (OBJECT, None, INSIDE, "{}", "goes on"),
        (OBJECT, None, MAY_THINK, "<think>{}", "goes on"),
        (OBJECT, None, CHANNELS, "{}", 0),
    ],
)
def test_what_it_may_not_be(form, calls, thinking, wrong, place):
    assert ends_of(answer_grammar(form, calls, thinking, ()), wrong) == place


def test_without_a_form_and_without_calls_there_is_no_grammar():
    assert answer_grammar(None, None, MAY_THINK, ()) is None
    assert answer_grammar(OBJECT, None, PLAIN, ()) is OBJECT


@pytest.mark.parametrize("form", sorted(BY_NAME))
def test_forms_without_json_cannot_be_forced(form):
    assert calls(form).can_be_forced == (form in ("hermes", "llama"))


def test_what_the_grammar_allows_is_what_the_reader_finds():
    text = f"<think>hm</think>\n{WEATHER}\n{NOW}"
    assert ends_of(answer_grammar(None, calls(), MAY_THINK, ()), text) == "may end"
    reader = reading_of("<think><tool_call>", BY_NAME["hermes"], SCHEMAS, begins_inside=False).make_reader()
    found = reader.add(text, final=True)
    assert found == [Thought("hm"), Call("weather", '{"city": "Rome"}'), Call("now", "{}")]
