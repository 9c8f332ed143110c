"""`peerd join`: which daemon a link makes, and which links it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from peerd.cli import daemon as cli_daemon
from peerd.cli.commands import starting
from peerd.cli.daemon import Daemon
from peerd.cli.keys.swarm_key import create_swarm_key, read_swarm_key
from peerd.cli.main import cli
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import peer_id_of
from peerd.protocol.invitation import Invitation, swarm_digest

ADDRESS = Multiaddr("ip4", "8.8.8.8", 31330, peer_id=peer_id_of(bytes(32)))
OPEN = Invitation((ADDRESS,), "org/name@0123456789012345678901234567890123456789")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Daemon]:
    """The daemons that were started, each with nothing of this machine's configuration."""
    found: list[Daemon] = []

    async def run_daemon(daemon: Daemon) -> None:
        found.append(daemon)

    monkeypatch.setattr(cli_daemon, "run_daemon", run_daemon)
    monkeypatch.setattr(starting, "set_up_logging", lambda *_arguments, **_options: None)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return found


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    create_swarm_key(tmp_path / "swarm.key")
    return tmp_path / "swarm.key"


def run(link: object, *arguments: str, **how: Any) -> Result:
    return CliRunner().invoke(cli, ["join", str(link), *arguments], prog_name="peerd", **how)


def test_alone_it_is_a_client_of_the_link_s_model_with_a_page(started: list[Daemon]) -> None:
    assert run(OPEN).exit_code == 0
    (daemon,) = started
    assert daemon.config.bootstrap == (ADDRESS,)
    assert daemon.config.serve == ()
    assert daemon.offer is not None
    assert daemon.offer.models == ((None, OPEN.model),)
    assert daemon.offer.open_page
    assert daemon.config.swarm_key is None


def test_asked_to_serve_it_serves_the_link_s_model(started: list[Daemon]) -> None:
    result = run(OPEN, "--serve-blocks", "auto", "--memory", "1GiB")
    assert result.exit_code == 0, result.stderr
    (daemon,) = started
    (spec,) = daemon.config.serve
    assert (spec.model, spec.blocks, spec.memory_bytes) == (OPEN.model, None, 2**30)
    assert daemon.offer is None


def test_a_link_from_standard_input_stays_out_of_the_list_of_processes(started: list[Daemon]) -> None:
    assert run("-", input=f"{OPEN}\n").exit_code == 0
    assert started[0].config.bootstrap == (ADDRESS,)


def test_a_link_with_the_key_is_all_that_is_needed(started: list[Daemon], key_file: Path) -> None:
    key = read_swarm_key(key_file)
    assert run(replace(OPEN, swarm=swarm_digest(key), key=key)).exit_code == 0
    assert started[0].config.swarm_key == key


def test_a_link_without_the_key_needs_the_right_file(started: list[Daemon], key_file: Path, tmp_path: Path) -> None:
    link = replace(OPEN, swarm=swarm_digest(read_swarm_key(key_file)))
    create_swarm_key(tmp_path / "other.key")
    without, wrong = run(link), run(link, "--swarm-key", str(tmp_path / "other.key"))
    assert (without.exit_code, wrong.exit_code, started) == (2, 2, [])
    assert "add --swarm-key FILE" in without.stderr
    assert "not that of the link" in wrong.stderr
    assert run(link, "--swarm-key", str(key_file)).exit_code == 0
    assert started[0].config.swarm_key == read_swarm_key(key_file)


def test_a_key_for_an_open_swarm_is_a_mistake(started: list[Daemon], key_file: Path) -> None:
    result = run(OPEN, "--swarm-key", str(key_file))
    assert (result.exit_code, started) == (2, [])
    assert "open to everybody" in result.stderr


def test_the_key_and_the_bootstrap_of_the_configuration_are_of_another_swarm(
    started: list[Daemon], key_file: Path, tmp_path: Path
) -> None:
    other = Multiaddr("ip4", "9.9.9.9", 1, peer_id=peer_id_of(bytes(32)))
    config = tmp_path / "config.toml"
    config.write_text(f'bootstrap = ["{other}"]\nswarm-key = "{key_file}"\n')
    result = run(OPEN, env={"PEERD_CONFIG": str(config)})
    assert result.exit_code == 0, result.stderr
    assert (started[0].config.bootstrap, started[0].config.swarm_key) == ((ADDRESS,), None)


def test_a_model_that_is_on_no_hub_is_asked_for(started: list[Daemon], tmp_path: Path) -> None:
    link = Invitation((ADDRESS,), "SmolLM2-135M")
    refused = run(link)
    assert (refused.exit_code, started) == (2, [])
    assert "SmolLM2-135M, which is on no hub" in refused.stderr
    assert "--model PATH" in refused.stderr
    (tmp_path / "config.json").write_text("{}")
    assert run(link, "--model", str(tmp_path)).exit_code == 0
    assert started[0].offer is not None
    assert started[0].offer.models == ((None, tmp_path),)


def test_a_link_without_a_model_asks_for_one(started: list[Daemon]) -> None:
    assert "names no model: add --model MODEL" in run(Invitation((ADDRESS,))).stderr
    assert started == []


@pytest.mark.parametrize("link", [str(OPEN)[:-1], "https://example.org/", "peerd://join/9,sum=x", "", "PEERD"])
def test_what_is_no_whole_link_is_refused_in_one_line(started: list[Daemon], link: str) -> None:
    result = run(link)
    assert (result.exit_code, started) == (2, [])
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


def test_its_help_has_the_daemon_s_options_under_their_headings_without_those_of_the_link() -> None:
    text = CliRunner().invoke(cli, ["join", "--help"]).stdout
    assert "Serve blocks for others:" in text
    assert "--serve-blocks" in text
    assert "--bootstrap" not in text.replace("--bootstrap-", "")
    assert "--revision" not in text
