"""What a daemon says at its start to somebody who has never seen one."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peerd.cli.daemon import Daemon, Offered, _curl, _say_what_is_missing
from peerd.peer_parts import PeerConfig
from peerd.protocol.addresses import Multiaddr

ADDRESS = Multiaddr.parse("/ip4/127.0.0.1/tcp/1/ws")


def said(caplog: pytest.LogCaptureFixture, *, models: int = 1, known: int = 0, **config: Any) -> str:
    offered = Offered(((None, "org/name"),) * models, Path("p.sock"), None, None)
    daemon = Daemon(Path("key"), PeerConfig(**config), offer=offered)
    peer = SimpleNamespace(discovery=SimpleNamespace(contacts=lambda: [object()] * known))
    with caplog.at_level(logging.INFO):
        _say_what_is_missing(daemon, cast(Any, peer))
    return caplog.text


def test_a_client_that_can_find_nobody_says_what_it_lacks(caplog: pytest.LogCaptureFixture) -> None:
    assert "give --bootstrap ADDRESS" in said(caplog)


@pytest.mark.parametrize("fields", [{"bootstrap": (ADDRESS,)}, {"listen": (ADDRESS,)}, {"known": 3}], ids=str)
def test_a_client_that_has_somebody_to_ask_says_nothing(caplog: pytest.LogCaptureFixture, fields: Any) -> None:
    assert said(caplog, **fields) == ""


def test_an_api_without_models_says_what_it_lacks(caplog: pytest.LogCaptureFixture) -> None:
    assert "add --model MODEL" in said(caplog, models=0, bootstrap=(ADDRESS,))


def test_the_command_that_is_printed_is_one_that_a_shell_reads(tmp_path: Path) -> None:
    token = tmp_path / "api token"
    token.write_text("secret\n")
    offered = Offered((), tmp_path / "a b.sock", ("127.0.0.1", 8080), token)
    for url, expected in (
        ("unix:", f"--unix-socket|{offered.socket_path}|http://localhost/v1/models"),
        ("http://127.0.0.1:8080", "-H|Authorization: Bearer secret|http://127.0.0.1:8080/v1/models"),
    ):
        command = _curl(url, offered).replace("curl", "printf '%s|'", 1)
        assert subprocess.run(command, shell=True, capture_output=True, text=True).stdout == f"{expected}|"
