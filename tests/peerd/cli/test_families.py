"""`peerd models --families` says what is served, what is refused, and why."""

from __future__ import annotations

import json

from click.testing import CliRunner

from peerd.cli.main import cli
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.families.refused import NOT_SERVED, REFUSED


def said(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["models", *arguments])
    assert result.exit_code == 0
    return result.output


def test_every_architecture_stands_once_below_its_reason() -> None:
    text = said("--families")
    served, gguf_and_refused = text.split("of them from GGUF files too")
    refused = gguf_and_refused.split("are refused:")[1]
    for name in FAMILIES:
        assert f" {name}" in served
    words = [word.strip(",") for word in refused.split()]
    for name in {**REFUSED, **NOT_SERVED}:
        assert words.count(name) == 1
    shared = refused.index("share KV caches")
    assert shared < refused.index("gemma3n_text") < refused.index("it drafts for another model")
    assert max(map(len, text.splitlines())) <= 100


def test_as_json_for_programs() -> None:
    fields = json.loads(said("--families", "--json"))
    assert fields["served"] == sorted(FAMILIES)
    assert "llama" in fields["gguf"]
    assert fields["refused"] == {**REFUSED, **NOT_SERVED}


def test_without_what_to_list_it_says_the_option() -> None:
    result = CliRunner().invoke(cli, ["models"])
    assert result.exit_code == 2
    assert "--families" in result.output
