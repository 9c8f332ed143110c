"""`peerd invite`: whose words it prints, what it warns of, and where the key may be."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from peerd.cli.commands import running
from peerd.cli.invitations.inviting import Inviting, blocks, invite, notes
from peerd.cli.keys.swarm_key import create_swarm_key, read_swarm_key
from peerd.cli.main import cli
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.identity import peer_id_of
from peerd.protocol.invitation import Invitation, swarm_digest

ADDRESS = Multiaddr("ip4", "8.8.8.8", 31330, peer_id=peer_id_of(bytes(32)))
KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No daemon and no configuration of whoever runs the tests."""
    monkeypatch.setattr(running, "set_up_logging", lambda _level: None)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    create_swarm_key(tmp_path / "swarm.key")
    return tmp_path / "swarm.key"


@asynccontextmanager
async def daemon_that_says(path: Path, status: str, body: dict[str, Any]) -> AsyncIterator[list[str]]:
    """A daemon on a socket that answers everything alike. Yields what it was asked."""
    asked: list[str] = []

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            asked.append((await stream.receive_some()).decode().splitlines()[0])
            await stream.send_all(f"HTTP/1.0 {status}\r\n\r\n{json.dumps(body)}".encode())

    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        yield asked
        nursery.cancel_scope.cancel()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["invite", *arguments], prog_name="peerd")


def test_without_a_daemon_the_named_peers_and_model_are_in_the_link() -> None:
    result = run("org/name", "--bootstrap", str(ADDRESS))
    assert result.exit_code == 0, result.stderr
    assert Invitation.parse(result.stdout) == Invitation((ADDRESS,), "org/name")
    assert "peerd join LINK" in result.stderr


def test_a_folder_of_this_machine_is_named_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "My-Model").mkdir()
    found = Invitation.parse(run(str(tmp_path / "My-Model"), "--bootstrap", str(ADDRESS)).stdout)
    assert found.model == "My-Model"


def test_neither_a_daemon_nor_a_peer_is_a_mistake_that_names_both_ways_out() -> None:
    result = run("org/name")
    assert result.exit_code == 2
    assert "peerd --client" in result.stderr
    assert "--bootstrap ADDRESS" in result.stderr


def test_a_private_swarm_s_link_has_the_digest_and_only_if_asked_the_key(key_file: Path) -> None:
    key = read_swarm_key(key_file)
    named = ("org/name", "--bootstrap", str(ADDRESS), "--swarm-key", str(key_file))
    plain, secret = run(*named), run(*named, "--with-key")
    assert Invitation.parse(plain.stdout) == Invitation((ADDRESS,), "org/name", swarm_digest(key))
    assert "--swarm-key FILE" in plain.stderr
    assert Invitation.parse(secret.stdout).key == key
    assert "This link is a secret" in secret.stderr
    assert "secret" not in plain.stderr


def test_a_key_is_asked_for_where_it_is_to_be_in_the_link() -> None:
    result = run("org/name", "--bootstrap", str(ADDRESS), "--with-key")
    assert result.exit_code == 2
    assert "add --swarm-key FILE" in result.stderr


def test_programs_get_json_without_the_picture() -> None:
    found = json.loads(run("org/name", "--bootstrap", str(ADDRESS), "--json").stdout)
    assert Invitation.parse(found.pop("link")).model == "org/name"
    assert found == {"private": False, "reach": "internet", "model": "org/name", "has_key": False}


def test_the_code_is_shown_where_it_is_asked_for() -> None:
    pytest.importorskip("segno")
    shown = run("org/name", "--bootstrap", str(ADDRESS), "--qr").stdout.splitlines()
    assert shown[0].startswith("peerd://join/1,")
    assert "█▀▀▀▀▀█" in shown[2]
    assert max(map(len, shown[1:])) <= 80
    assert len(run("org/name", "--bootstrap", str(ADDRESS), "--no-qr").stdout.splitlines()) == 1


def test_two_rows_of_a_code_make_a_line_with_a_light_border() -> None:
    lines = blocks(("10", "01", "11"))
    assert lines.split("\n") == ["      ", "  ▀▄  ", "  ▀▀  ", "      "]


@pytest.mark.parametrize(
    ("host", "words"), [("192.168.1.8", "inside that network only"), ("127.0.0.1", "works here only")]
)
def test_a_link_that_does_not_work_everywhere_says_so(host: str, words: str) -> None:
    address = Multiaddr("ip4", host, 1, peer_id=ADDRESS.peer_id)
    assert any(words in line for line in notes(Invitation((address,), "a/b")))


async def test_the_daemon_knows_the_addresses_and_the_key_comes_from_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key_file: Path
) -> None:
    key = read_swarm_key(key_file)
    found = Invitation((ADDRESS,), "org/name", swarm_digest(key))
    socket = tmp_path / "d.sock"
    async with daemon_that_says(socket, "200 OK", {"link": str(found)}) as asked:
        await invite(Inviting(model="my model", socket_path=socket, key_file=key_file, with_key=True))
        assert asked == ["GET /peerd/v1/invitation?model=my%20model HTTP/1.0"]
        assert Invitation.parse(capsys.readouterr().out).key == key
        other = tmp_path / "other.key"
        create_swarm_key(other)
        with pytest.raises(InvalidRequest, match="another swarm"):
            await invite(Inviting(socket_path=socket, key_file=other, with_key=True))


async def test_an_open_swarm_has_no_key_to_give(tmp_path: Path, key_file: Path) -> None:
    socket = tmp_path / "d.sock"
    async with daemon_that_says(socket, "200 OK", {"link": str(Invitation((ADDRESS,), "a/b"))}):
        with pytest.raises(InvalidRequest, match="leave out --with-key"):
            await invite(Inviting(socket_path=socket, key_file=key_file, with_key=True))


async def test_what_the_daemon_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    socket = tmp_path / "d.sock"
    async with daemon_that_says(socket, "404 Not Found", {"error": {"message": "there is no model 'x' here"}}):
        with pytest.raises(InvalidRequest, match="there is no model 'x' here"):
            await invite(Inviting(model="x", socket_path=socket))
