"""The forms of tool calls: each finds its calls in a text, however the text is cut, and leaves the rest alone."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.api.openai.tool_calls.call import Call
from peerd.api.openai.tool_calls.forms import FORMS, form_of

SCHEMAS = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "now": {"type": "object", "properties": {}},
}
CITY = {"city": "Łódź", "days": 3}
CITY_TEXT = json.dumps(CITY, ensure_ascii=False)
WEATHER, NOW = ("weather", CITY), ("now", {})
BAR, SPACE = "\uff5c", "\u2581"
BY_NAME = {form.name: form for form in FORMS}


def ds(name):
    return f"<{BAR}tool{SPACE}{name.replace(' ', SPACE)}{BAR}>"


HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {CITY_TEXT}}}\n</tool_call>'
HERMES_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nŁódź\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
GLM = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Łódź</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
OLD_DS = f"{ds('call begin')}function{ds('sep')}weather\n```json\n{CITY_TEXT}\n```{ds('call end')}"
NEW_DS = f"{ds('call begin')}weather{ds('sep')}{CITY_TEXT}{ds('call end')}"
NOW_DS = f"{ds('call begin')}now{ds('sep')}{{}}{ds('call end')}"
THOUGHT = "<|channel|>analysis<|message|>I should look.<|end|><|start|>assistant"
HARMONY = f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{CITY_TEXT}<|call|>"

# The form, what the model says, the text for the user, and the calls.
SAID = [
    ("hermes", HERMES, "", [WEATHER]),
    ("hermes", f"I look.\n{HERMES}\n{HERMES_NOW}", "I look.", [WEATHER, NOW]),
    ("hermes", HERMES.removesuffix("</tool_call>"), "", [WEATHER]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"x\\"}"}</tool_call>', "",
     [("weather", {"city": "x"})]),
    ("xml", f"So: {XML}", "So:", [WEATHER]),
    ("xml", "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", [NOW]),
    ("glm", f"\n{GLM}\n<tool_call>now\n</tool_call>", "", [WEATHER, NOW]),
    ("glm", "<tool_call>weather<arg_key>city</arg_key><arg_value>12</arg_value></tool_call>", "",
     [("weather", {"city": "12"})]),
    ("xml", XML.replace("3", "NaN"), "", [("weather", CITY | {"days": "NaN"})]),
    ("glm", GLM.replace("3", "1e999"), "", [("weather", CITY | {"days": "1e999"})]),
    ("glm", GLM.replace("3", '"\\ud83d"'), "", [("weather", CITY | {"days": '"\\ud83d"'})]),
    ("hermes", HERMES.replace("Łódź", "\\ud83d\\ude00"), "", [("weather", CITY | {"city": "\U0001f600"})]),
    ("llama", f'{{"name": "weather", "parameters": {CITY_TEXT}}}', "", [WEATHER]),
    ("llama", f'<|python_tag|>{{"name": "weather", "parameters": {CITY_TEXT}}}; {{"name": "now", "parameters": {{}}}}',
     "", [WEATHER, NOW]),
    ("llama", 'Sure. <|python_tag|>{"name": "now", "parameters": {}}', "Sure.", [NOW]),
    ("mistral", f'[TOOL_CALLS][{{"name": "weather", "arguments": {CITY_TEXT}}}, {{"name": "now", "arguments": {{}}}}]',
     "", [WEATHER, NOW]),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{CITY_TEXT}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{{}}", "", [WEATHER, NOW]),
    ("mistral", f"[TOOL_CALLS]weather{CITY_TEXT}", "", [WEATHER]),
    ("deepseek", f"Look:\n{ds('calls begin')}{OLD_DS}\n{ds('calls end')}", "Look:", [WEATHER]),
    ("deepseek", f"{ds('calls begin')}{NEW_DS}{NOW_DS}{ds('calls end')}", "", [WEATHER, NOW]),
    ("harmony", THOUGHT + HARMONY, "", [WEATHER]),
    ("harmony", HARMONY.removesuffix("<|call|>"), "", [WEATHER]),
    ("harmony", THOUGHT + " to=functions.now<|channel|>commentary json<|message|>{}<|call|>", "", [NOW]),
    ("harmony", "<|channel|>commentary<|message|>I look. <|end|><|start|>assistant" + HARMONY, "I look. ", [WEATHER]),
    ("harmony", THOUGHT + "<|channel|>final<|message|>It rains.<|return|>", "It rains.", []),
]  # fmt: skip

# What is no call stays text.
PLAIN = [
    ("hermes", "  Just a text.\n"),
    ("hermes", "\n"),
    ("hermes", "<tool_call>oops</tool_call> and more\n"),
    ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"ci'),
    ("hermes", "a < b, <tool"),
    ("hermes", "<tool_call>" + "[" * 100_000),
    # What JSON's escapes can write, and no answer can carry.
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "\\ud83d"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"days": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"days": 1e999}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"x": ' + "[" * 900 + "]" * 900 + "}}</tool_call>"),
    ("llama", '{"name": "now", "parameters": {"days": -Infinity}}'),
    ("xml", "<tool_call><function=f>\nloose\n</function></tool_call>"),
    ("glm", "<tool_call>\n</tool_call>"),
    ("llama", '{"name": "Ada", "parameters": {}}'),
    ("llama", '{"city": "Rome"}'),
    ("llama", "<|python_tag|>print(1)"),
    ("llama", '{"name": "now", "parameters": {}} is JSON'),
    ("mistral", "[TOOL_CALLS]nothing"),
    ("mistral", '[TOOL_CALLS][{"name": 3}]'),
    ("deepseek", f"{ds('calls begin')}x{ds('calls end')}"),
    ("deepseek", f"{ds('calls begin')}So: {NEW_DS}{ds('calls end')}"),
    ("deepseek", f"{ds('calls begin')}{NEW_DS}and more{ds('calls end')}"),
    ("deepseek", f"{ds('calls begin')}{NEW_DS.replace('weather', 'I look')}{ds('calls end')}"),
    # The older form without its fence: no tool is called "function".
    (
        "deepseek",
        f"{ds('calls begin')}{ds('call begin')}function{ds('sep')}{CITY_TEXT}{ds('call end')}{ds('calls end')}",
    ),
    ("glm", "<tool_call>hello</tool_call>"),
    ("glm", "<tool_call>weather<arg_key>city</arg_key>oops<arg_value>x</arg_value></tool_call>"),
    ("harmony", "A text without a header"),
]


def read(form, pieces):
    """The text and the calls in an answer that comes in these pieces."""
    reader = BY_NAME[form].reader(SCHEMAS)
    found = [each for piece in pieces for each in reader.add(piece)] + reader.add("", final=True)
    calls = [(each.name, json.loads(each.arguments)) for each in found if isinstance(each, Call)]
    return "".join(each for each in found if isinstance(each, str)), calls


@pytest.mark.parametrize(("form", "said", "text", "calls"), SAID)
def test_calls_are_found(form, said, text, calls):
    assert read(form, [said]) == (text, calls)
    assert read(form, said) == (text, calls)


@pytest.mark.parametrize(("form", "said"), PLAIN, ids=lambda value: value[:40])
def test_what_does_not_parse_stays_text(form, said):
    assert read(form, [said]) == (said, [])


@given(st.data())
def test_an_answer_reads_alike_however_it_is_cut(data):
    form = data.draw(st.sampled_from(sorted(BY_NAME)))
    known = [said for name, said, *_ in SAID if name == form] + [said for name, said in PLAIN if name == form]
    marks = [*BY_NAME[form].marks, " ", "\n", "{", "}", "text"]
    parts = st.sampled_from([said for said in known if len(said) < 1000] + marks)
    said = "".join(data.draw(st.lists(parts, min_size=1, max_size=4)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=8)))
    pieces = [said[start:end] for start, end in zip([0, *cuts], [*cuts, len(said)], strict=True)]
    assert read(form, pieces) == read(form, [said])


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("deepseek", ds("calls begin") + ds("call begin") * 100_000),
        ("deepseek", ds("calls begin") + (ds("call begin") + "x" + ds("sep")) * 50_000),
        ("glm", "<tool_call>f" + "<arg_key>k" + "</arg_key><arg_value>" * 100_000 + "</tool_call>"),
        ("xml", "<tool_call><function=f>" + "<parameter=k>" * 100_000 + "</tool_call>"),
        ("xml", "<tool_call><function=f>" + "</function>x" * 100_000 + "</tool_call>"),
    ],
    ids=lambda value: value[:30],
)
def test_an_answer_that_repeats_a_mark_is_read_in_time_proportional_to_its_length(form, said):
    """In quadratic time each of these takes minutes."""
    assert read(form, [said]) == (said, [])


TYPES = {
    "text": {"type": "string"},
    "maybe": {"type": ["string", "null"]},
    "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    "one": {"oneOf": [{"type": "number"}, {"type": "null"}]},
    "zip": {"enum": ["01234", "12"]},
    "level": {"enum": [1, 2, "3"]},
    "named": {"$ref": "#/$defs/Named"},
    "all": {"allOf": [{"$ref": "#/$defs/Named"}]},
    "circle": {"$ref": "#/$defs/Circle"},
    "list": {"type": "array"},
    "whole": {"type": "integer"},
    "free": {},
}
DEFINITIONS = {"Named": {"enum": ["7", "8"]}, "Circle": {"$ref": "#/$defs/Circle"}}


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("text", "12", "12"),
        ("text", "true", "true"),
        ("text", '"quoted"', '"quoted"'),
        ("maybe", "12", "12"),
        ("maybe", "null", None),
        ("either", "12", 12),
        ("either", "1.5", "1.5"),
        ("one", "1.5", 1.5),
        ("zip", "12", "12"),
        ("level", "2", 2),
        ("level", "3", "3"),
        ("level", "4", "4"),
        ("named", "7", "7"),
        ("all", "8", "8"),
        ("circle", "7", 7),
        ("list", "[1, 2]", [1, 2]),
        ("list", "a, b", "a, b"),
        ("whole", "3.0", 3.0),
        ("free", "12", 12),
        ("free", '"12"', "12"),
        ("unknown", "12", 12),
    ],
)
@pytest.mark.parametrize("form", ["glm", "xml"])
def test_a_value_without_quotes_has_a_type_that_the_schema_allows(form, key, written, value):
    body = {
        "glm": f"<tool_call>f<arg_key>{key}</arg_key><arg_value>{written}</arg_value></tool_call>",
        "xml": f"<tool_call><function=f><parameter={key}>{written}</parameter></function></tool_call>",
    }[form]
    schema = {"type": "object", "properties": TYPES, "$defs": DEFINITIONS}
    [call] = BY_NAME[form].reader({"f": schema}).add(body, final=True)
    assert json.loads(call.arguments) == {key: value}


def test_text_comes_as_soon_as_it_cannot_be_a_call():
    reader = BY_NAME["hermes"].reader(SCHEMAS)
    assert reader.add("It rains") == ["It rains"]
    assert reader.add(" <tool") == []
    assert reader.add("box>") == [" <toolbox>"]
    assert reader.add(HERMES) == [Call("weather", CITY_TEXT)]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>{{ call | tojson }}</tool_call>", "hermes"),
        ("<tool_call>\n<function={{ name }}>", "xml"),
        ("<tool_call>{{ name }}<arg_key>", "glm"),
        ('{{ "<|python_tag|>" }}', "llama"),
        ('{"name": function name, "parameters": dictionary}', "llama"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        (f"{{{{ '{ds('calls begin')}' }}}}", "deepseek"),
        ("<|channel|>commentary to=functions.{{ name }}", "harmony"),
    ],
)
def test_a_template_shows_its_form(template, name):
    form = form_of(template)
    assert form is not None
    assert form.name == name


def test_a_template_without_signs_has_no_form():
    assert form_of("{% for m in messages %}{{ m.content }}{% endfor %}") is None
