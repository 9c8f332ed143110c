"""Grammars over a model's tokens: what they allow, wherever the answer stands, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.client.grammars.grammar import MAX_CHARACTERS, Grammar
from peerd.client.grammars.vocabulary import Vocabulary
from peerd.protocol.errors import InvalidRequest

END = 256
THINK = 257
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def byte_vocabulary(*more, encode=lambda text: list(text.encode())):
    return Vocabulary([*(bytes([byte]) for byte in range(256)), b"<end>", *more], [END], encode)


@pytest.fixture(scope="module")
def vocabulary():
    return byte_vocabulary()


def row_of(vocabulary, grammar):
    return vocabulary.compile(grammar).row([END])


def allowed(row, answer):
    """The tokens that may follow."""
    return set(row.allowed(list(answer), END + 1).nonzero().flatten().tolist())


def accepts(row, text):
    """Whether the text may be said, and the answer may end behind it."""
    data = text.encode()
    steps = all(data[place] in allowed(row, data[:place]) for place in range(len(data)))
    return steps and (row.is_over(data) or END in allowed(row, data))


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (Grammar.json_object(), ['{"a": [1, 2.5, null]}', "{}", '{\n    "a": "\u00e9\\n"\n}'], ["[]", "{a: 1}", "x{}"]),
        (Grammar.json_schema(PERSON), ['{"name": "Ada", "age": 36}'], ["{}", '{"name": 1, "age": 36}']),
        (Grammar.json_schema({}), ["1", '"x"', "{}"], ["", "x"]),
        (Grammar.regex("[0-9]{3}-[a-f]+/?"), ["123-abc", "000-f/"], ["12-a", "123-", "123-g"]),
        (Grammar.choice(["yes", "no", 'a "quote"']), ["yes", "no", 'a "quote"'], ["ye", "maybe"]),
        (Grammar.lark('start: word ("," word)*\nword: /[a-z]+/'), ["a,bc", "x"], [",", "a,"]),
        (Grammar.ebnf('root ::= "a" [0-9]+ ("." b)?\nb ::= "x"'), ["a12", "a1.x"], ["a", "a1."]),
        (Grammar.lark('start: "ok: " %json {"type": "boolean"}'), ["ok: true"], ["ok: 1"]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_grammar_allows_its_texts_and_no_others(vocabulary, grammar, right, wrong):
    for text in right:
        assert accepts(row_of(vocabulary, grammar), text), text
    for text in wrong:
        assert not accepts(row_of(vocabulary, grammar), text), text


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        (Grammar.json_schema({"type": "strin"}), "Invalid type: strin"),
        (Grammar.json_schema({"type": "array", "uniqueItems": True}), 'Unimplemented keys: ."uniqueItems"'),
        (Grammar.json_schema({"$ref": "http://example.com/schema"}), "does not fetch resources"),
        (Grammar.json_schema({"$ref": "#/$defs/missing"}), "missing"),
        (Grammar.json_schema(False), "schema is false"),
        (Grammar.json_schema({"enum": []}), "Unsatisfiable schema"),
        (Grammar.json_schema({"$ref": "#"}), "nothing can follow"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.regex("("), "regex parse error"),
        (Grammar.lark("start: nope"), 'unknown name: "nope"'),
        (Grammar.lark("{"), "1"),
        (Grammar.ebnf('root ::= "a'), "Unexpected end of input"),
        (Grammar.ebnf("(" * 5000), "convert"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(vocabulary, grammar, problem):
    with pytest.raises(InvalidRequest, match=problem) as caught:
        vocabulary.compile(grammar)
    assert len(str(caught.value)) < 320


def test_keywords_that_cannot_be_enforced_are_ignored_unless_the_schema_is_strict(vocabulary):
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    assert accepts(row_of(vocabulary, Grammar.json_schema(schema, strict=False)), "[1,1]")
    overlapping = {"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 5}]}
    assert accepts(row_of(vocabulary, Grammar.json_schema(overlapping, strict=False)), "7")
    with pytest.raises(InvalidRequest, match="oneOf"):
        vocabulary.compile(Grammar.json_schema(overlapping))


def test_a_schema_cannot_bring_options_of_its_own(vocabulary):
    schema = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.raises(InvalidRequest, match="uniqueItems"):
        vocabulary.compile(Grammar.json_schema(schema))


_DOUBLED = "".join(f"R{number}: R{number + 1} R{number + 1}\n" for number in range(40))
_BRANCHES = [{"anyOf": [{"properties": {f"{i}{j}": {"type": "null"}}} for j in range(6)]} for i in range(9)]
HUGE = {
    "combinations": Grammar.json_schema({"allOf": _BRANCHES}),
    "repetitions": Grammar.regex("((((a{1000}){1000}){1000}){1000})"),
    "doubled tokens": Grammar.lark(f'start: R0\n{_DOUBLED}R40: "a"'),
    "doubled rules": Grammar.lark(f'start: R0\n{_DOUBLED}R40: "a"'.replace("R", "r")),
    "repeated rules": Grammar.lark('start: ("a"{1000}){1000}'),
    "ambiguous rules": Grammar.lark('start: a\na: a a | a a a | "a" | ""'),
    "intersections": Grammar.lark("start: X\nX: /(.*a.*){8}/ & /(.*b.*){8}/ & /(.*c.*){8}/ & ~/.*d.*e.*/"),
    "properties": Grammar.json_schema({"type": "object", "properties": {f"p{i}": {"maximum": i} for i in range(1500)}}),
    "nested arrays": Grammar.json_schema({"minItems": 10**6, "items": {"minItems": 10**6, "items": {}}}),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_grammar_is_refused_or_followed_and_never_computed_for_long(vocabulary, name):
    problem = ""
    try:
        row, answer = row_of(vocabulary, HUGE[name]), b""
        for _ in range(10):
            answer += bytes([min(allowed(row, answer) - {END})])
    except InvalidRequest as error:
        problem = str(error)
    assert re.search("^$|too |fuel|items", problem)


def test_a_grammar_has_a_longest_length():
    with pytest.raises(ValueError, match=f"at most {MAX_CHARACTERS}"):
        Grammar.regex("a" * (MAX_CHARACTERS + 1))


def test_spaces_have_an_end_where_json_allows_any_number(vocabulary):
    row = row_of(vocabulary, Grammar.json_object())
    assert 32 in allowed(row, b"{" + b" " * 60)
    assert 32 not in allowed(row, b"{" + b" " * 64)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_the_place_may_be_anywhere_before_or_behind_the_last_one(places):
    answer = b'{"name": "Ada", "age": 36}'
    grammar = byte_vocabulary().compile(Grammar.json_schema(PERSON))
    walked = grammar.row([END])
    for place in places:
        here = answer[:place]
        assert walked.is_over(here) == (place >= len(answer))
        assert allowed(walked, here) == allowed(grammar.row([END]), here)


def test_another_answer_than_before_is_followed_from_where_they_part(vocabulary):
    row = row_of(vocabulary, Grammar.regex("(ab|ac)*"))
    assert allowed(row, b"abac") == {ord("a"), END}
    assert allowed(row, b"abab") == {ord("a"), END}
    assert allowed(row, b"a") == {ord("b"), ord("c")}


def test_the_end_is_allowed_where_the_grammar_may_end_and_only_there(vocabulary):
    row = vocabulary.compile(Grammar.regex("ab*")).row([END, ord("b")])
    assert allowed(row, b"") == {ord("a")}
    assert allowed(row, b"a") == {ord("b"), END}
    assert allowed(vocabulary.compile(Grammar.regex("a+bc")).row([END, ord("b")]), b"a") == {ord("a")}


def test_a_grammar_that_none_of_the_model_s_tokens_fits_says_so():
    numbers = Vocabulary([str(number).encode() for number in range(10)], [], lambda text: [])
    with pytest.raises(InvalidRequest, match="the model has no tokens for a text in it"):
        numbers.compile(Grammar.regex("x[0-9]"))
    row = numbers.compile(Grammar.regex("[0-9]x[0-9]|[0-9]yy")).row([])
    assert row.allowed([], 10).all()
    with pytest.raises(InvalidRequest, match="fails after 1 tokens: nothing can follow"):
        row.allowed([5], 10)
    later = numbers.compile(Grammar.regex("[0-9]xx")).row([])
    with pytest.raises(InvalidRequest, match="fails after 1 tokens: the model has no tokens for a text in it"):
        later.allowed([5], 10)


def test_special_tokens_are_no_text_but_a_grammar_may_name_them():
    vocabulary = Vocabulary([b"a", b"<", b"|", b">", b"<|a|>", b"a<", b""], [4], lambda text: [])
    row = vocabulary.compile(Grammar.regex("(?s:.*)")).row([])
    assert row.allowed([], 7).tolist() == [True, True, True, True, False, True, False]
    named = vocabulary.compile(Grammar.lark('start: <|a|> "a"')).row([])
    assert named.allowed([], 7).tolist() == [False] * 4 + [True, False, False]


@pytest.mark.parametrize("ids", [[257], [258], []], ids=str)
def test_text_that_is_certain_is_said_in_the_tokens_of_the_model_s_own_tokenizer(ids):
    """Where the tokenizer changes the text, the longest tokens are taken."""
    grammar = byte_vocabulary(b"yes", b" yes", encode=lambda text: ids).compile(Grammar.regex("yes[0-9]"))
    assert grammar.row([END]).allowed([], 300).nonzero().flatten().tolist() == [257]


def test_a_grammar_is_shown_by_its_beginning():
    assert repr(Grammar.regex("a" * 99)) == f"<Grammar regex {'a' * 60 + '...'!r}>"
    assert json.loads(Grammar.json_object().definition())["grammars"][0]["json_schema"]["type"] == "object"
