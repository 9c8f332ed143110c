"""The configuration: flag before environment before file before default, and mistakes that are named."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from peerd.cli import daemon as cli_daemon
from peerd.cli import process_limits
from peerd.cli.commands import starting, watching
from peerd.cli.config.settings import SHARED, settings_of, shared_with
from peerd.cli.config.writing import commented, toml
from peerd.cli.daemon import Daemon
from peerd.cli.help import HEADINGS, REST, SHORT_HELP
from peerd.cli.main import cli
from peerd.cli.processes import PeerProcesses
from peerd.local.profile import default_config_file

ADDRESS = "/ip4/127.0.0.1/tcp/31330/ws/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
SETTINGS = settings_of(cli)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests say to all daemons that they start is not what is tested here."""
    monkeypatch.delenv("PEERD_NO_MDNS")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that peerd reads; it is not there yet."""
    path = tmp_path / "config.toml"
    monkeypatch.setenv("PEERD_CONFIG", str(path))
    return path


def run(*arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="peerd", env=environ)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Daemon]:
    """The daemons that were started."""
    daemons: list[Daemon] = []

    async def run_daemon(daemon: Daemon) -> None:
        daemons.append(daemon)

    monkeypatch.setattr(cli_daemon, "run_daemon", run_daemon)
    monkeypatch.setattr(process_limits, "raise_descriptor_limit", lambda: None)
    monkeypatch.setattr(process_limits, "share_heaps", lambda: None)
    monkeypatch.setattr(starting, "set_up_logging", lambda *_arguments, **_options: None)
    return daemons


def in_force(**environ: str) -> dict[str, tuple[Any, str]]:
    result = run("config", "--json", **environ)
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["settings"]
    return {each["key"]: (each["value"], each["from"]) for each in settings if each["from"] != "default"}


def test_the_environment_counts_more_than_the_file(config: Path) -> None:
    config.write_text('kv-tokens = 100\nmemory = "6GiB"\nno-relay = true\nbootstrap = []\n')
    assert in_force(PEERD_KV_TOKENS="200", PEERD_NO_RELAY="no", PEERD_DTYPE="") == {
        "kv-tokens": ("200", "PEERD_KV_TOKENS"),
        "memory": ("6GiB", str(config)),
        "no-relay": (False, "PEERD_NO_RELAY"),
        "bootstrap": ([], str(config)),
    }


def test_the_command_line_counts_most(config: Path, started: list[Daemon]) -> None:
    config.write_text(f'listen = ["/ip4/127.0.0.1/tcp/1/ws"]\nbootstrap = "{ADDRESS}"\nno-relay = true\n')
    assert run("--listen", "/ip4/127.0.0.1/tcp/2/ws", PEERD_LISTEN="/ip4/127.0.0.1/tcp/3/ws").exit_code == 0
    assert run("--identity", "x.key", PEERD_LISTEN="/ip4/127.0.0.1/tcp/3/ws /ip4/127.0.0.1/tcp/4/ws").exit_code == 0
    assert run("--identity", "x.key").exit_code == 0
    assert [[address.port for address in daemon.config.listen] for daemon in started] == [[2], [3, 4], [1]]
    assert all([str(one) for one in daemon.config.bootstrap] == [ADDRESS] for daemon in started)
    assert not any(daemon.config.may_be_relayed for daemon in started)


def test_peerd_alone_starts_what_the_file_describes(config: Path, started: list[Daemon]) -> None:
    config.write_text("verbose = true\n")
    assert run().stdout == SHORT_HELP
    assert run(PEERD_LISTEN="/ip4/127.0.0.1/tcp/3/ws", PEERD_CONFIG="").stdout == SHORT_HELP
    assert not started
    config.write_text('listen = "/ip4/127.0.0.1/tcp/1/ws"\n')
    assert run().exit_code == 0
    assert len(started) == 1


def test_help_and_version_need_no_file(config: Path) -> None:
    config.write_text("nonsense")
    for option in ("--help", "--version"):
        assert run(option).exit_code == 0
    assert run("peers", "--help").exit_code == 0
    assert run("generate", "-h").exit_code == 0
    assert run("peers").exit_code == 2
    assert run().exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv_tokens = 1", "no key 'kv_tokens': did you mean kv-tokens?"),
        ("KV-Tokens = 1", "did you mean kv-tokens?"),
        ('"--client" = true', "did you mean client?"),
        ("bootstrp = []", "did you mean bootstrap?"),
        ("xyzzy = 1", "no key 'xyzzy': peerd config lists all keys"),
        ("config = 'x'", "no key 'config'"),
        ("version = true", "no key 'version'"),
        ("[serve]\nclient = true", "[serve] begins a table"),
        ("client = 1", "client: 1 is neither true nor false"),
        ("kv-tokens = true", "kv-tokens: True is not a text or a number"),
        ("kv-tokens = [1]", "kv-tokens: [1] is not a text or a number"),
        ("kv-tokens = 0", "kv-tokens: 0 is not in the range"),
        ("memory = 'much'", "memory: "),
        ("bootstrap = [1, {}]", "bootstrap: {} is not texts"),
        ("bootstrap = 'here'", "bootstrap: 'here' is not a peerd address"),
        ("dtype = 'float8'", "dtype: 'float8' is not one of"),
        ("listen = 2026-11-30", "is not texts"),
        ("client = ", "is not TOML"),
        ("client = true\nclient = true", "is not TOML"),
        ("a = " + "[" * 5000, "is not TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_place(config: Path, text: str, message: str) -> None:
    config.write_text(text)
    for arguments in ((), ("config",), ("--client",)):
        result = run(*arguments)
        assert result.exit_code == 2
        assert str(config) in result.stderr
        assert message in result.stderr


def test_a_file_that_cannot_be_read_is_named(config: Path, tmp_path: Path) -> None:
    config.write_bytes(b"\xff\xfe")
    assert "is not TOML" in run("config").stderr
    config.write_text("#" * 2**20 + "##")
    assert "no configuration of peerd" in run("config").stderr
    assert "cannot be read" in run("--config", str(tmp_path), "config").stderr
    missing = tmp_path / "missing.toml"
    assert f"peerd config init {missing}" in run("--config", str(missing), "config").stderr


def test_a_mistake_in_the_environment_is_named_with_its_variable(config: Path) -> None:
    config.write_text("")
    for variable, text in (("PEERD_KV_TOKENS", "many"), ("PEERD_CLIENT", "perhaps"), ("PEERD_LISTEN", "a b")):
        result = run("config", **{variable: text})
        assert result.exit_code == 2
        assert f"{variable}: " in result.stderr


def test_the_default_file_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEERD_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_config_file() == tmp_path / "peerd/config.toml"
    assert "there is no such file" in run("config").stdout
    assert run("config", "init").exit_code == 0
    assert run("config").stdout.splitlines()[0] == f"# {default_config_file()}"
    default_config_file().write_text("kv-tokens = 7")
    assert in_force() == {"kv-tokens": ("7", str(default_config_file()))}


# Other commands.


def test_a_command_gets_what_it_shares_with_the_daemon_and_no_more(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Path | None] = []
    monkeypatch.setattr(watching, "run_once", lambda _ctx, work, verbose: asked.append(work.args[0]))
    config.write_text(f'socket = "{tmp_path / "a.sock"}"\nmodel = "a/folder/that/is/gone"\nserve-blocks = 3\n')
    assert run("peers").exit_code == 0
    assert run("peers", PEERD_SOCKET="b.sock").exit_code == 0
    assert run("peers", "--socket", "c.sock", PEERD_SOCKET="b.sock").exit_code == 0
    assert asked == [tmp_path / "a.sock", Path("b.sock"), Path("c.sock")]


def test_a_command_refuses_a_file_with_an_unknown_key(config: Path) -> None:
    config.write_text("sockets = 1")
    assert "did you mean socket?" in run("peers").stderr


def test_a_file_may_be_named_before_a_command_but_other_options_may_not(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("kv-tokens = 9")
    assert "kv-tokens" in run("--config", str(other), "config").stdout
    assert "must come after config" in run("--kv-tokens", "9", "config").stderr


def test_what_commands_share_is_parsed_alike() -> None:
    by_key = {setting.key: setting for setting in SETTINGS}
    assert set(SHARED) <= by_key.keys()
    for command in cli.commands.values():
        for setting in shared_with(command, SETTINGS):
            (own,) = [param for param in command.params if f"--{setting.key}" in param.opts]
            assert isinstance(own, click.Option)
            assert own.multiple == setting.option.multiple
            assert own.is_flag == setting.option.is_flag
            assert own.name == setting.option.name


def test_peers_of_a_demonstration_do_not_read_the_user_s_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEERD_KV_TOKENS", "1")
    environment = PeerProcesses(tmp_path, 1)._environment
    assert "PEERD_KV_TOKENS" not in environment
    assert environment["PEERD_CONFIG"] == os.devnull
    assert environment["PEERD_STRICT"] == "1"
    assert environment["PATH"] == os.environ["PATH"]


# What is written.


def test_every_option_of_a_daemon_is_in_the_file_that_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.toml"
    result = run("config", "init", str(path))
    assert result.exit_code == 0
    assert str(path) in result.stderr
    text = path.read_text()
    assert tomllib.loads(text) == {}
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    examples = [line.removeprefix("# ") for line in lines if line.startswith("# ") and " = " in line]
    assert sorted(line.partition(" ")[0] for line in examples) == sorted(setting.key for setting in SETTINGS)
    tomllib.loads("\n".join(examples))
    again = run("config", "init", str(path))
    assert again.exit_code == 2
    assert "not overwritten" in again.stderr
    assert path.read_text() == text


def test_what_is_in_force_is_printed_as_a_file_that_means_the_same(config: Path, tmp_path: Path) -> None:
    config.write_text('allow-host = ["box", "b-2"]\nno-relay = true\nmemory = "6GiB"\nrevision = "\\"quoted\\" ü"\n')
    printed = tmp_path / "printed.toml"
    printed.write_text(run("config").stdout)
    assert tomllib.loads(printed.read_text()) == tomllib.loads(config.read_text())


@pytest.mark.parametrize("value", ["plain", 'a "b" \\ c', "tab\t\x01", True, 3, 0.5, ["a", 'b"']])
def test_values_are_written_as_toml(value: Any) -> None:
    assert tomllib.loads(f"x = {toml(value)}") == {"x": value}


def test_every_variable_and_key_is_the_option_s_own_name() -> None:
    for setting in SETTINGS:
        assert f"--{setting.key}" in setting.option.opts
        assert setting.variable == "PEERD_" + setting.key.upper().replace("-", "_")
    assert len({setting.key for setting in SETTINGS}) == len(SETTINGS)
    assert "## Serve blocks A to B-1" in commented(SETTINGS, HEADINGS, REST)
