"""Grammars are compiled in a process first, which is killed if it does not end. Real processes, real time."""

from __future__ import annotations

import pytest
import trio

from peerd.client.grammars.checking import LIMIT_S, open_grammar_check
from peerd.client.grammars.grammar import Grammar
from peerd.protocol.errors import InvalidRequest

pytestmark = pytest.mark.real_time

SMALL = Grammar.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}})
# Each compiles for many seconds, whatever the bounds are.
ENDLESS = {
    "multiples": {"type": "integer", "multipleOf": 999_983},
    "patterns": {
        "type": "object",
        "patternProperties": {f"^x{number}.*y{number}$": {} for number in range(1500)},
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("name", ENDLESS)
async def test_a_grammar_whose_compilation_does_not_end_is_refused_and_the_next_one_checked(name):
    async with open_grammar_check() as checks:
        await checks.check(SMALL)
        with trio.fail_after(LIMIT_S + 20):
            with pytest.raises(InvalidRequest, match="compiling it did not end within 2 s"):
                await checks.check(Grammar.json_schema(ENDLESS[name]))
            await checks.check(Grammar.regex("a+"))


@pytest.mark.parametrize(
    "grammar",
    [Grammar.regex("("), Grammar.json_schema({"type": "x"}), Grammar.ebnf("root ::= ("), Grammar.ebnf("(" * 9999)],
    ids=repr,
)
async def test_what_is_wrong_is_left_for_the_compilation_itself_to_say(grammar):
    async with open_grammar_check() as checks:
        await checks.check(grammar)
        await checks.check(SMALL)


async def test_what_was_checked_is_not_checked_again():
    async with open_grammar_check() as checks:
        await checks.check(SMALL)
        with trio.fail_after(0.0):
            await checks.check(Grammar.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}}))


async def test_a_check_that_was_cancelled_does_not_disturb_the_next():
    async with open_grammar_check() as checks:
        await checks.check(SMALL)
        with trio.move_on_after(0.1) as scope:
            await checks.check(Grammar.json_schema(ENDLESS["multiples"]))
        assert scope.cancelled_caught
        await checks.check(Grammar.regex("b+"))
