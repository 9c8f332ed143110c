"""Options of the command line reach what they are for."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from peerd.cli import daemon as cli_daemon
from peerd.cli.commands import chat as chat_command
from peerd.cli.commands import generate as generate_command
from peerd.cli.commands import running, starting, watching
from peerd.cli.commands import training as training_command
from peerd.cli.daemon import Daemon
from peerd.cli.main import cli
from peerd.discovery.mdns import open_zeroconf
from peerd.protocol.identity import PeerId, peer_id_of
from tests.compute.gguf_models import tiny_config, tiny_model

ADDRESS = "/ip4/127.0.0.1/tcp/31330/ws/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
PEER = peer_id_of(bytes(32))
SERVER = ("--serve-blocks", "4", "--model", "org/name", "--bootstrap", ADDRESS)
CLIENT = ("--client", "--model", "org/name", "--bootstrap", ADDRESS)


@pytest.fixture(autouse=True)
def no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def run(*arguments: str) -> None:
    result = CliRunner().invoke(cli, arguments, prog_name="peerd")
    assert result.exit_code == 0, result.output


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Daemon]:
    """`daemon(*arguments)`: the daemon that they describe."""
    found: list[Daemon] = []

    async def run_daemon(daemon: Daemon) -> None:
        found.append(daemon)

    monkeypatch.setattr(cli_daemon, "run_daemon", run_daemon)
    monkeypatch.setattr(starting, "set_up_logging", lambda *_arguments, **_options: None)

    def describe(*arguments: str) -> Daemon:
        run(*arguments)
        return found.pop()

    return describe


def test_who_may_be_in_chains(daemon: Callable[..., Daemon]) -> None:
    rules = daemon(*CLIENT, "--allow", PEER).config.rules
    assert rules is not None
    assert rules.allowed == frozenset({PeerId(PEER)})
    rules = daemon(*CLIENT, "--block", PEER).config.rules
    assert rules is not None
    assert rules.blocked == frozenset({PeerId(PEER)})


def test_what_the_local_api_offers(daemon: Callable[..., Daemon]) -> None:
    offer = daemon(*CLIENT, "--keep-sessions", "0", "--open").offer
    assert offer is not None
    assert (offer.keep_positions, offer.open_page, offer.http) == (0, True, ("127.0.0.1", 0))
    assert not offer.traces
    offer = daemon(*CLIENT, "--traces").offer
    assert offer is not None
    assert offer.traces


@pytest.mark.parametrize(
    ("arguments", "meets"),
    [
        ((), True),
        (("--no-mdns",), False),
        (("--listen", "/ip4/0.0.0.0/tcp/0/ws"), True),
        (("--listen", "/ip4/127.0.0.1/tcp/0/ws"), False),
        (("--listen", "/ip4/127.0.0.1/tcp/0/ws", "--listen", "/ip4/192.168.1.2/tcp/0/ws"), True),
    ],
)
def test_whether_neighbours_are_met(
    daemon: Callable[..., Daemon], arguments: tuple[str, ...], meets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests say otherwise for all daemons that they start.
    monkeypatch.delenv("PEERD_NO_MDNS")
    assert (daemon(*CLIENT, *arguments).config.multicast is open_zeroconf) == meets


@pytest.mark.parametrize(
    ("arguments", "idle_only", "nice"),
    [
        ((), False, 0),
        (("--nice", "5"), False, 5),
        (("--idle-only",), True, 10),
        (("--idle-only", "--nice", "0"), True, 0),
    ],
)
def test_whether_and_how_a_server_yields(
    daemon: Callable[..., Daemon], arguments: tuple[str, ...], idle_only: bool, nice: int
) -> None:
    found = daemon(*SERVER, *arguments)
    assert (found.idle_only, found.nice) == (idle_only, nice)


def test_whose_adapters_are_served(monkeypatch: pytest.MonkeyPatch, daemon: Callable[..., Daemon]) -> None:
    for given, any_base in (((), False), (("--any-base",), True)):
        spec = daemon(*SERVER, "--adapter", "org/rhymes", *given).config.serve[0]
        assert (spec.adapters, spec.any_base) == ((("rhymes", "org/rhymes"),), any_base)


def asked_of(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> partial[Any]:
    """The work that a command would run."""
    works: list[partial[Any]] = []
    monkeypatch.setattr(module, "run_once", lambda _ctx, work, **_options: works.append(work))
    run(*arguments)
    return works[0]


def test_an_answer_waits_for_servers_if_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = ("generate", "org/name", "--prompt", "Hi", "--bootstrap", ADDRESS)
    assert asked_of(generate_command, monkeypatch, *asking, "--wait").args[2].waits
    assert not asked_of(generate_command, monkeypatch, *asking).args[2].waits


def test_an_adapter_of_another_model_is_used_if_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = ("generate", "org/name", "--prompt", "Hi", "--bootstrap", ADDRESS, "--adapter", "./own")
    assert asked_of(generate_command, monkeypatch, *asking, "--any-base").args[2].any_base
    assert not asked_of(generate_command, monkeypatch, *asking).args[2].any_base
    result = CliRunner().invoke(cli, [*asking[:-2], "--any-base"])
    assert result.exit_code == 2
    assert "--any-base is for an adapter: add --adapter" in result.output


def test_how_often_the_swarm_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_of(watching, monkeypatch, "top", "--every", "5").keywords == {"every_s": 5.0}


def test_where_a_training_begins_and_that_it_is_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Once upon a time")
    training = (
        "train-span",
        "org/name",
        "--blocks",
        "0:4",
        "--text",
        str(tmp_path / "text"),
        "--output",
        str(tmp_path),
    )
    asked = asked_of(training_command, monkeypatch, *training, "--bootstrap", ADDRESS, "--from-step", "20", "--publish")
    assert (asked.args[2].from_step, asked.args[2].publish, asked.args[2].text) == (20, True, "Once upon a time")


def test_what_a_draft_head_learns_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Once upon a time")
    (tmp_path / "asked").write_text("Why?\n\n How? \n")
    training = ("train-draft", "org/name", "--output", str(tmp_path), "--bootstrap", ADDRESS)
    sources = ("--text", str(tmp_path / "text"), "--questions", str(tmp_path / "asked"))
    how = ("--minutes", "3", "--tokens", "1000", "--guessable", "500", "--device", "cpu", "--seed", "2")
    wanted = asked_of(training_command, monkeypatch, *training, *sources, *how).args[2]
    assert (wanted.text, wanted.questions, wanted.answers) == ("Once upon a time", ("Why?", "How?"), True)
    assert (wanted.minutes, wanted.tokens, wanted.guessable, wanted.seed) == (3.0, 1000, 500, 2)


def test_a_chat_begins_with_the_system_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    works: list[partial[Any]] = []
    monkeypatch.setattr(chat_command, "run", lambda _ctx, work: works.append(work))
    monkeypatch.setattr(chat_command, "set_up_logging", lambda _level: None)
    run("chat", "org/name", "--bootstrap", ADDRESS, "--system", "Be brief.", "--no-history")
    (asked,) = works[0].args
    assert (asked.system, asked.keeps_history, asked.wants_own) == ("Be brief.", False, True)


@pytest.mark.real_time
def test_a_manifest_holds_a_digest_for_each_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "set_up_logging", lambda _level: None)
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(cli, ["manifest", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert len(found["blocks"]) == tiny_config("llama").num_hidden_layers
