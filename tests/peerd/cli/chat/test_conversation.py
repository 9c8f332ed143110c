"""What a chat remembers, and what may be typed."""

from __future__ import annotations

import json

import pytest

from peerd.api.fields import Fields
from peerd.api.openai.requests import read_chat
from peerd.cli.chat.commands import COMMANDS, Command, help_text, parse
from peerd.cli.chat.conversation import SETTINGS, Conversation
from peerd.protocol.errors import InvalidRequest


def roles(conversation: Conversation) -> str:
    return "".join(turn["role"][0] for turn in conversation.request()["messages"])


def test_turns_alternate_whatever_was_stopped_or_failed() -> None:
    talk = Conversation("smol")
    talk.ask("one")
    talk.answered("1")
    talk.ask("failed")
    talk.answered("")
    talk.ask("two")
    talk.answered("2, and in the mid")
    talk.ask("three")
    assert [turn["content"] for turn in talk.turns] == ["one", "1", "two", "2, and in the mid", "three"]
    assert roles(talk) == "uauau"


def test_retry_asks_the_last_question_again() -> None:
    talk = Conversation("smol")
    with pytest.raises(InvalidRequest, match="nothing was asked"):
        talk.take_back_answer()
    talk.ask("one")
    talk.take_back_answer()
    assert roles(talk) == "u"
    talk.answered("1")
    talk.take_back_answer()
    assert roles(talk) == "u"


def test_the_system_prompt_comes_first_and_is_no_turn() -> None:
    talk = Conversation("smol", system="Be short.")
    talk.ask("one")
    assert roles(talk) == "su"
    talk.clear()
    assert roles(talk) == "s"
    talk.system = ""
    assert roles(talk) == ""


def test_every_setting_is_a_field_of_the_api() -> None:
    talk = Conversation("smol")
    talk.ask("one")
    for name in SETTINGS:
        talk.set(name, "1")
    read = read_chat(Fields(json.loads(json.dumps(talk.request()))))
    assert read.common.max_tokens == 1
    assert read.common.include_chain
    assert read.common.sampling["repetition_penalty"] == 1.0
    for name in SETTINGS:
        talk.set(name, "")
    assert talk.settings == {}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temprature", "1", "did you mean temperature?"),
        ("xyzzy", "1", "there are temperature, top_p"),
        ("top_k", "0.5", "top_k is a whole number, not '0.5'"),
        ("temperature", "warm", "temperature is a number, not 'warm'"),
    ],
)
def test_a_wrong_setting_is_named_and_changes_nothing(name: str, value: str, message: str) -> None:
    talk = Conversation("smol")
    with pytest.raises(InvalidRequest) as refused:
        talk.set(name, value)
    assert message in str(refused.value)
    assert talk.settings == {}


def test_what_is_saved_can_be_read_again() -> None:
    talk = Conversation("smol", "Sei kurz.", {"seed": 3})
    talk.ask("Grüß\n\ud800")
    saved = json.loads(talk.to_json())
    assert saved["messages"] == talk.request()["messages"]
    assert saved["settings"] == {"seed": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", "hello"),
        ("", ""),
        (" /quit", " /quit"),
        ("//etc is a folder", "/etc is a folder"),
        ("/quit", Command("quit")),
        ("/exit ", Command("quit")),
        ("/set temperature  0.5", Command("set", "temperature  0.5")),
        ("/system Be\nshort", Command("system", "Be\nshort")),
        ("/save  a b.json ", Command("save", "a b.json")),
    ],
)
def test_a_line_is_a_command_or_a_text(text: str, expected: Command | str) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/sav x", "did you mean /save?"),
        ("/xyzzy", "/help lists all"),
        ("/", "/help lists all"),
        ("/save", "/save needs FILE"),
        ("/retry now", "/retry takes nothing"),
    ],
)
def test_a_wrong_command_is_named_with_the_right_one(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(text)
    assert message in str(refused.value)


def test_the_help_has_every_command_within_80_columns() -> None:
    lines = help_text().splitlines()
    assert {line.split()[0] for line in lines[:-1]} == {f"/{name}" for name in COMMANDS}
    assert max(map(len, lines)) <= 100
