"""Profiles: each daemon of a user has files of its own, and commands speak to the daemon of theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from peerd.cli import daemon as cli_daemon
from peerd.cli.commands import running, starting
from peerd.cli.daemon import Daemon
from peerd.cli.main import cli
from peerd.local.profile import VARIABLE, profile, state_folder
from peerd.local.socket_path import default_socket_path

ADDRESS = "/ip4/127.0.0.1/tcp/31330/ws/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG_HOME", "STATE_HOME", "RUNTIME_DIR"):
        monkeypatch.setenv(f"XDG_{name}", str(tmp_path))
    # What a command sets is undone after the test.
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("PEERD_CONFIG", "/dev/null")
    for module in (starting, running):
        monkeypatch.setattr(module, "set_up_logging", lambda *_arguments, **_options: None)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Daemon]:
    found: list[Daemon] = []

    async def run_daemon(daemon: Daemon) -> None:
        found.append(daemon)

    monkeypatch.setattr(cli_daemon, "run_daemon", run_daemon)
    return found


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="peerd")


def test_a_profile_has_a_key_a_token_and_a_socket_of_its_own(started: list[Daemon], tmp_path: Path) -> None:
    client = ("--client", "--http", "127.0.0.1:0", "--model", "org/name", "--bootstrap", ADDRESS)
    assert run("--profile", "lab", *client).exit_code == 0
    assert run("--profile", "", *client).exit_code == 2
    (lab,) = started
    assert lab.offer is not None
    assert lab.identity_file == tmp_path / "peerd/profiles/lab/identity.key"
    assert lab.offer.token_file == tmp_path / "peerd/profiles/lab/api.token"
    assert lab.offer.socket_path == tmp_path / "peerd-lab.sock"


def test_without_one_all_is_as_it_always_was(started: list[Daemon], tmp_path: Path) -> None:
    run("--client", "--bootstrap", ADDRESS)
    (daemon,) = started
    assert daemon.identity_file == tmp_path / "peerd/identity.key"
    assert daemon.offer is not None
    assert daemon.offer.socket_path == tmp_path / "peerd.sock"


def test_its_file_is_written_read_and_shown(started: list[Daemon], tmp_path: Path) -> None:
    assert run("--profile", "lab", "config", "init").exit_code == 0
    file = tmp_path / "peerd/profiles/lab.toml"
    assert file.exists()
    file.write_text(f'client = true\nbootstrap = ["{ADDRESS}"]\n')
    assert json.loads(run("--profile", "lab", "config", "--json").stdout)["file"] == str(file)
    assert run("--profile", "lab").exit_code == 0
    assert [str(address) for address in started[0].config.bootstrap] == [ADDRESS]


@pytest.mark.parametrize("command", ["status", "peers", "top", "invite"])
def test_commands_speak_to_the_daemon_of_their_profile(command: str, tmp_path: Path) -> None:
    assert str(tmp_path / "peerd-lab.sock") in run("--profile", "lab", command).stderr


def test_the_environment_names_one_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "lab")
    assert str(tmp_path / "peerd-lab.sock") in run("status").stderr
    assert default_socket_path() == tmp_path / "peerd-lab.sock"
    assert state_folder() == tmp_path / "peerd/profiles/lab"


@pytest.mark.parametrize("name", ["../lab", "Lab", "a b", "x" * 33, "-lab"])
def test_what_is_no_name_is_refused_and_never_a_path(
    name: str, started: list[Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(f"--profile={name}", "--client")
    assert (result.exit_code, started) == (2, [])
    assert "is no name of a profile" in result.stderr
    monkeypatch.setenv(VARIABLE, name)
    assert profile() == ""
    assert run("--client").exit_code == 2
