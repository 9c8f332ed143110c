"""`peerd peers`, asked of a daemon on a socket, and shown at any width."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from peerd.cli.watching.asking import ask_daemon
from peerd.cli.watching.peers import as_text, listed, show_peers
from peerd.protocol.errors import InvalidRequest, Unresponsive

ONE, OTHER, US = (f"12D3KooW{letter * 44}" for letter in "abc")


def server(peer_id: str, start: int, end: int, **others: Any) -> dict[str, Any]:
    found = {"peer_id": peer_id, "start": start, "end": end, "state": "online", "positions_a_second": 12.5}
    found |= {"free_tokens": 4096, "rtt_ms": 7.25, "way": "relayed", "seen_since": 1000, "is_us": peer_id == US}
    return found | others


SWARM = {
    "peer_id": US,
    "models": [
        {"name": "smol", "servers": [server(ONE, 0, 15), server(US, 15, 30, rtt_ms=None, way=None)]},
        {"name": "big\x1b[31m", "servers": [server(ONE, 3, 4)]},
    ],
}
STATUS = {
    "peers": [
        {"peer_id": ONE, "rtt_ms": 7.25, "way": "relayed", "relay": US},
        {"peer_id": OTHER, "rtt_ms": None, "way": "punched", "relay": None},
    ]
}


def test_servers_come_by_model_and_other_peers_once() -> None:
    found = listed(SWARM, STATUS)
    assert [(each["model"][:4], each["peer_id"]) for each in found["servers"]] == [
        ("smol", ONE),
        ("smol", US),
        ("big\x1b", ONE),
    ]
    assert [peer["peer_id"] for peer in found["others"]] == [OTHER]


def test_a_table_shows_what_each_peer_does() -> None:
    lines = as_text(listed(SWARM, STATUS), None, 1065.0).splitlines()
    assert lines[0].split() == ["peer", "serves", "state", "speed", "free", "KV", "delay", "way", "seen", "for"]
    assert "12D3KooW..aaaaaa   0:15 of smol" in lines[1]
    assert lines[1].endswith("12.5/s   4096      7.2 ms   relayed         0:01:05")
    assert lines[2].startswith("this peer ")
    assert "not connected" in lines[2]
    assert lines[-1] == "2 servers, 1 other peer connected"
    assert not any("\x1b" in line for line in lines)


def test_a_narrow_terminal_gets_paragraphs() -> None:
    lines = as_text(listed(SWARM, STATUS), 40, 1065.0).splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[:3] == ["12D3KooW..aaaaaa", "  serves: 0:15 of smol", "  state: online"]


def test_a_daemon_without_models_and_peers_says_so() -> None:
    empty = listed({"peer_id": US, "models": []}, {"peers": []})
    assert as_text(empty, 80, 0.0) == "0 servers, 0 other peers connected"


def answering(**answers: bytes) -> Any:
    async def serve(stream: trio.SocketStream) -> None:
        question = (await stream.receive_some()).split()[1].decode()
        await stream.send_all(answers[question.rpartition("/")[2]])
        await stream.aclose()

    return serve


def http(value: Any) -> bytes:
    return b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(value).encode()


async def open_socket(path: Any) -> trio.SocketListener:
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    return trio.SocketListener(listener)


@pytest.mark.real_time
async def test_the_command_asks_the_daemon(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "peerd.sock"
    serve = answering(swarm=http(SWARM), status=http(STATUS))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [await open_socket(path)])
        await show_peers(path, as_json=True)
        assert json.loads(capsys.readouterr().out) == listed(SWARM, STATUS)
        await show_peers(path, as_json=False)
        assert "2 servers" in capsys.readouterr().out
        nursery.cancel_scope.cancel()


@pytest.mark.real_time
async def test_without_a_daemon_it_says_how_to_start_one(tmp_path: Any) -> None:
    with pytest.raises(InvalidRequest, match="peerd --client"):
        await show_peers(tmp_path / "peerd.sock", as_json=False)


@pytest.mark.real_time
@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 404 x\r\n\r\n{}", http([]), b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000]
)
async def test_what_is_no_answer_is_refused(tmp_path: Any, answer: bytes) -> None:
    path = tmp_path / "peerd.sock"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answering(swarm=answer), [await open_socket(path)])
        with pytest.raises(Unresponsive):
            await ask_daemon(path, "/peerd/v1/swarm")
        nursery.cancel_scope.cancel()
