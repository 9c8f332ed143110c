"""The command line: its output, its refusals and its exit codes, without a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from peerd.cli import daemon as cli_serve
from peerd.cli.console import printable, short, table
from peerd.cli.daemon import Daemon
from peerd.cli.help import HEADINGS, SHORT_HELP
from peerd.cli.keys.swarm_key import read_swarm_key
from peerd.cli.main import cli
from peerd.cli.options.shared import joining
from peerd.compute.errors import CheckpointError
from peerd.protocol.errors import ConnectionLost, ContextTooLong, LinkFailed, NoChain, NoRoom, PeerdError
from peerd.protocol.identity import Identity
from peerd.reach.relay_ledger import RelayLimits
from peerd.routing.chains.rules import Manifest
from peerd.spans.spec import Trainable

ADDRESS = "/ip4/127.0.0.1/tcp/31330/ws/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"

PEER = ADDRESS.rpartition("/")[2]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="peerd")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """What looks like a model's directory, for mistakes that are found before it is opened."""
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


def test_no_arguments_print_one_screen_that_says_what_to_do_first() -> None:
    result = run()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "  peerd demo" in lines
    assert "--help" in result.stdout


def test_the_first_screen_names_only_options_and_commands_that_exist() -> None:
    known = {option for param in cli.params for option in param.opts}
    known |= {option for command in cli.commands.values() for param in command.params for option in param.opts}
    commands = re.findall(r"^  peerd ([a-z]+)", SHORT_HELP, re.MULTILINE)
    assert set(re.findall(r"--[a-z-]+", SHORT_HELP)) <= known | {"--help"}
    assert commands
    assert set(commands) <= set(cli.commands)


def test_help_groups_the_options_of_a_daemon_by_role() -> None:
    text = run("--help").stdout
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings[: len(HEADINGS) + 1] == [*(f"{heading}:" for heading in HEADINGS), "Options:"]
    section = text.partition("Offer a local API:")[2].partition("Join a swarm:")[0]
    assert "--client" in section
    assert "--http" in section
    assert "--listen" not in section


def test_each_option_is_in_the_help_once_and_each_heading_names_options_that_exist() -> None:
    names = [name for group in HEADINGS.values() for name in group]
    assert len(names) == len(set(names))
    assert set(names) <= {param.name for param in cli.params}
    lines = run("--help").stdout.splitlines()
    for param in cli.params:
        assert (
            sum(line.strip().startswith(param.opts[-1] + " ") for line in lines) == 1 or param.opts[-1] == "--verbose"
        )


def test_an_argument_is_not_listed_among_the_options_of_a_daemon() -> None:
    assert re.search(r"^  LINK\b", run("join", "--help").stdout.partition("Options:")[2], re.MULTILINE) is None


def test_help_teaches_by_examples_and_lists_the_exit_codes() -> None:
    text = run("--help").stdout
    assert "peerd demo" in text
    assert "peerd --serve-blocks" in text
    assert "3    some blocks of the model have no server" in text
    for command in ("generate", "demo"):
        assert "3    some blocks of the model have no server" in run(command, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--serve-blocks", "0:3"], "--model"),
        (["--serve-blocks", "3:3", "--model", "MODEL"], "0 <= START < END"),
        (["--serve-blocks", "most", "--model", "MODEL"], "START:END"),
        (["--serve-blocks", "0", "--model", "MODEL"], "START:END"),
        (["--model", "MODEL"], "--serve-blocks"),
        (["--bootstrap", ADDRESS], "--client"),
        (["--client", "--bootstrap", "/ip4/127.0.0.1/tcp/31330/ws"], "add /p2p/"),
        (["--client", "--kv-tokens", "64"], "add --serve-blocks"),
        (["--client", "--device", "cpu"], "add --serve-blocks"),
        (["--client", "--disk", "1GB"], "add --model"),
        (["--client", "--model", "a=a/b", "--model", "c/d", "--revision", "main"], "org/name@revision"),
        (["--serve-blocks", "1", "--model", "a/b@x y"], "no revision of a/b"),
        (["--serve-blocks", "1", "--model", "a/b@x", "--revision", "y"], "say one of them"),
        (["--serve-blocks", "1", "--model", "MODEL", "--revision", "main"], "only a model on a hub has revisions"),
        (["--serve-blocks", "1", "--model", "a/b", "--disk", "much"], "much"),
        (["--serve-blocks", "1", "--model", "MODEL", "--model", "MODEL"], "give each once"),
        (["--serve-blocks", "0:4", "--models", "org/*"], "--serve-blocks auto or N"),
        (["--serve-blocks", "auto", "--models", "org/*", "--model", "MODEL"], "no --model"),
        (["--client", "--models", "org/*"], "--serve-blocks auto or N"),
        (["--serve-blocks", "auto", "--models", "org/*", "--revision", "main"], "which commit it serves"),
        (["--client", "--look-every", "60"], "add --serve-blocks"),
        (["--serve-blocks", "auto", "--model", "MODEL", "--trainable", PEER], "or add --no-move"),
        (["--serve-blocks", "0:4", "--model", "MODEL", "--trainable-rate", "0.1"], "whom --trainable names"),
        (["--client", "--trainable", PEER], "add --serve-blocks"),
        (["train-span", "MODEL", "--blocks", "0:1", "--text", "MODEL/config.json", "--output", "x"], "--bootstrap"),
        (["train-span", "MODEL", "--blocks", "4"], "4"),
        (["train-draft", "MODEL", "--output", "x"], "--bootstrap"),
        (["train-draft", "MODEL", "--output", "x", "--bootstrap", ADDRESS, "--no-answers"], "nothing to learn from"),
        (["--client", "--model", "=MODEL"], "has no name"),
        (["--client", "--model", "a=MODEL", "--model", "a=MODEL"], "the same NAME"),
        (["--client", "--http", "8080"], "HOST:PORT"),
        (["--client", "--trusted", "12D3KooWnobody"], "a PeerId is"),
        (["--client", "--swarm-key", "MODEL/config.json"], "chmod 600"),
        (["--client", "--manifest", "MODEL/config.json"], "not a manifest"),
        (["keys", "new-swarm", "MODEL/config.json"], "already"),
        (["--client", "--no-token"], "for --http"),
        (["--client", "--allow-host", "box"], "for --http"),
        (["--client", "--http", "127.0.0.1:0", "--allow-host", "box:80"], "is not the name of a host"),
        (["--client", "--http", "127.0.0.1:0", "--allow-origin", "http://a/b"], "is not an origin"),
        (["--client", "--http", "0.0.0.0:8080", "--no-token"], "to the network"),
        (["--serve-blocks", "1", "--model", "MODEL", "--device", "gpu"], "cuda:N"),
        (["--serve-blocks", "1", "--model", "MODEL", "--device", "cuda:99"], "there is no cuda:99 here"),
        (["--client", "--announce", ADDRESS], "--announce needs --listen"),
        (["--client", "--listen", "127.0.0.1:80"], "allowed is /ip4|ip6"),
        (["--client", "--relay"], "--relay needs --listen"),
        (["--listen", ADDRESS, "--relay-slots", "3"], "add --relay"),
        (["--listen", ADDRESS, "--relay", "--relay-slots", "0"], "1<=x<=65535"),
        (["--listen", ADDRESS, "--relay", "--relay-rate", "1KB"], "16KiB or more"),
        (["--listen", ADDRESS, "--relay", "--relay-rate", "2TiB"], "1TiB or less"),
        (["--serve-blocks", "auto", "--model", "MODEL", "--memory", "lots"], "lots"),
        (["--serve-blocks", "auto", "--model", "MODEL", "--dtype", "int3"], "bfloat16"),
        (["--client", "generate", "MODEL", "--prompt", "x"], "--client must come after generate"),
        (["generate", "MODEL", "--prompt", "x"], "--bootstrap"),
        (["generate", "MODEL", "--bootstrap", ADDRESS], "--prompt-file FILE"),
        (["generate", "MODEL", "--bootstrap", ADDRESS, "--prompt", "x", "--temperature", "-1"], "x>=0"),
        (["generate", "MODEL", "--bootstrap", ADDRESS, "--prompt", "x", "--top-p", "0"], "0<x<=1"),
        (["generate", "MODEL", "--bootstrap", ADDRESS, "--prompt", "x", "--max-new-tokens", "0"], "x>=1"),
        (["demo", "--servers", "0"], "x>=1"),
        (["generate", "MODEL", "--prompt", "x", "--prompt-file", "MODEL/config.json"], "exclude each other"),
        (["generate", "MODEL", "--prompt", "x", "--draft", "MODEL", "--no-speculate"], "leave out one"),
        (["generate", "MODEL", "--prompt", "x", "--draft-device", "cuda"], "for --draft MODEL"),
        (["generate", "MODEL", "--prompt", "x", "--draft", "./nowhere"], "./nowhere does not exist"),
        (["--client", "--model", "MODEL", "--draft", "MODEL", "--draft-device", "cuda:all"], "cuda or cuda:N"),
        (["--client", "--draft", "MODEL"], "add --client and --model"),
        (["serve"], "No such command"),
    ],
)
def test_a_mistake_exits_2_and_says_what_to_write_instead(arguments: list[str], message: str, model: str) -> None:
    result = run(*[word.replace("MODEL", model) for word in arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_what_a_daemon_is_told_reaches_what_it_serves_and_offers(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    daemons: list[Daemon] = []

    async def be(daemon: Daemon) -> None:
        daemons.append(daemon)

    monkeypatch.setattr(cli_serve, "run_daemon", be)
    serving = ("--serve-blocks", "auto", "--no-move", "--quantize", "int8", "--throughput", "500", "--model", model)
    client = str(Identity.generate().peer_id)
    serving += ("--uplink", "2.5MB", "--look-every", "60", "--trainable", client, "--trainable-steps", "500")
    serving += ("--identity", f"{model}/own.key", "--serve-head", "--remote-head")
    result = run(*serving, "--http", "127.0.0.1:8080", "--token-file", f"{model}/token", "--socket", f"{model}/p.sock")
    assert result.exit_code == 0, result.stderr
    (daemon,) = daemons
    (spec,) = daemon.config.serve
    assert (spec.blocks, spec.stay, spec.quantize, spec.throughput) == (None, True, "int8", 500)
    assert (spec.uplink, spec.look_every_s, spec.head) == (2_500_000, 60, True)
    assert spec.trainable == Trainable(frozenset({client}), Path(model) / "own.state/trained", max_steps=500)
    offer = daemon.offer
    assert offer is not None
    assert (offer.http, offer.token_file) == (("127.0.0.1", 8080), Path(model) / "token")
    assert offer.socket_path == Path(model) / "p.sock"
    assert offer.remote_head


def test_patterns_in_place_of_a_model_reach_what_a_daemon_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    daemons: list[Daemon] = []

    async def be(daemon: Daemon) -> None:
        daemons.append(daemon)

    monkeypatch.setattr(cli_serve, "run_daemon", be)
    patterns = ("--models", "org/*", "--models", "~/models/*")
    result = run("--serve-blocks", "auto", *patterns, "--disk", "1GB", "--no-serve-head")
    assert result.exit_code == 0, result.stderr
    (spec,) = daemons[0].config.serve
    assert (spec.model, spec.among, spec.blocks, spec.head) == ("", ("org/*", "~/models/*"), None, False)
    assert daemons[0].disk_bytes == 10**9


def test_what_an_operator_gives_away_as_a_relay_reaches_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    daemons: list[Daemon] = []

    async def be(daemon: Daemon) -> None:
        daemons.append(daemon)

    monkeypatch.setattr(cli_serve, "run_daemon", be)
    listening = ("--listen", "/ip4/127.0.0.1/tcp/0/ws")
    limits = ("--relay-slots", "3", "--relay-circuits", "4", "--relay-rate", "1MiB", "--relay-total-rate", "5MiB")
    for arguments in ((), ("--relay",), ("--relay", *limits, "--relay-hours", "0.5"), ("--no-relay", "--no-punch")):
        result = run(*listening, *arguments)
        assert result.exit_code == 0, result.stderr
    assert [daemon.config.relay for daemon in daemons] == [
        None,
        RelayLimits(),
        RelayLimits(slots=3, circuits=4, bytes_a_second=2**20, total_bytes_a_second=5 * 2**20, circuit_s=1800),
        None,
    ]
    assert [daemon.config.may_be_relayed for daemon in daemons] == [True, True, True, False]
    assert [daemon.config.may_punch for daemon in daemons] == [True, True, True, False]


def test_a_key_and_a_manifest_that_it_makes_are_taken_again(tmp_path: Path) -> None:
    key, manifest = tmp_path / "swarm.key", tmp_path / "manifest.json"
    assert run("keys", "new-swarm", str(key)).exit_code == 0
    manifest.write_text(Manifest(b"m" * 32, (b"b" * 32,)).to_json())
    peer = ADDRESS.rpartition("/")[2]
    options = {"bootstrap": (), "swarm_key": key, "manifests": (manifest,), "allowed": (), "blocked": (peer,)}
    swarm = joining(options | {"trusted": (), "no_relay": True, "no_punch": False})
    assert swarm.swarm_key == read_swarm_key(key)
    assert swarm.rules is not None
    assert (swarm.rules.allowed, swarm.rules.blocked) == (None, {peer})
    assert swarm.rules.manifests == (Manifest.read(manifest),)


def test_a_model_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty", tmp_path / "notes.txt"
    empty.mkdir()
    text.write_text("no model")
    arguments = ["--prompt", "x", "--bootstrap", ADDRESS]
    assert "has no config.json" in run("generate", str(empty), *arguments).stderr
    assert "is neither a .gguf file" in run("generate", str(text), *arguments).stderr
    missing = run("generate", "./some-model", *arguments)
    assert missing.exit_code == 2
    assert "called org/name on a model hub" in missing.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NoChain("nobody serves blocks 15:30", ((15, 30),)), 3),
        (NoRoom("12 KV tokens are free"), 4),
        (ConnectionLost("the connection ended"), 4),
        (LinkFailed("hop 0 cannot reach hop 1"), 4),
        (ContextTooLong("9000 positions wanted"), 2),
        (CheckpointError("model.gguf: is truncated"), 2),
    ],
)
def test_each_kind_of_failure_has_its_exit_code_and_one_line(error: Exception, code: int) -> None:
    @click.command()
    def fails() -> None:
        raise error

    group = type(cli)("peerd", commands=[fails])
    result = CliRunner().invoke(group, ["fails"])
    assert result.exit_code == code
    assert result.stderr == f"Error: {error}\n"


def test_a_bug_is_not_dressed_up_as_an_error_of_the_user() -> None:
    @click.command()
    def fails() -> None:
        raise PeerdError("nobody said whose fault this is")

    result = CliRunner().invoke(type(cli)("peerd", commands=[fails]), ["fails"])
    assert isinstance(result.exception, PeerdError)


def test_a_terminal_never_gets_control_characters_from_strangers() -> None:
    assert printable("a\x1b[31mb\x9bc\r\nd\te\u00a0\U0001f468\u200d\U0001f469") == (
        "a[31mbc\nd\te\u00a0\U0001f468\u200d\U0001f469"
    )


def test_a_short_peer_id_shows_where_it_differs() -> None:
    assert short("12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA") == "12D3KooW..AJU5SA"


def test_a_table_has_its_columns_under_each_other_and_no_trailing_spaces() -> None:
    assert table([("peer", "serves"), ("a", "blocks 0:15"), ("longer", "b")]) == (
        "peer     serves\na        blocks 0:15\nlonger   b"
    )


def test_the_command_line_and_the_package_load_no_torch_until_it_is_needed() -> None:
    code = "import sys, peerd, peerd.cli.main; assert not {'torch', 'transformers'} & set(sys.modules); print('light')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("light\n", "")


def test_all_that_the_package_names_is_there() -> None:
    import peerd

    for name in peerd.__all__:
        assert getattr(peerd, name) is not None
    assert set(peerd.__all__) <= set(dir(peerd))
    with pytest.raises(AttributeError, match="no_such_name"):
        peerd.no_such_name  # noqa: B018
