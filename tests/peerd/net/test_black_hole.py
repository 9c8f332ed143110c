"""Packets that vanish under a real TCP connection, in a network namespace that the test makes."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from peerd.net.websockets.tcp import delivery_of

PROGRAM = Path(__file__).parents[2] / "fakes" / "black_hole.py"
IN_A_NAMESPACE = ("unshare", "--map-root-user", "--net")


def _may_make_namespaces() -> bool:
    if not all(map(shutil.which, ("unshare", "ip", "iptables"))):
        return False
    return subprocess.run([*IN_A_NAMESPACE, "iptables", "-L"], capture_output=True, check=False).returncode == 0


@pytest.mark.processes
@pytest.mark.skipif(not _may_make_namespaces(), reason="needs unprivileged network namespaces and iptables")
def test_both_sides_find_a_real_black_hole_in_seconds_and_outlive_a_loop_that_stood_still() -> None:
    run = subprocess.run([*IN_A_NAMESPACE, sys.executable, PROGRAM], capture_output=True, check=True, timeout=110)
    said = json.loads(run.stdout)
    assert said["survived"]
    assert len(said["lost"]) == 2
    for after_s, why in said["lost"]:
        assert after_s < 9  # 2 to 3 s on a machine that has time; without the system's word it is 10 s
        assert "nothing we send arrives" in why


@pytest.mark.real_time
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
async def test_the_system_says_how_much_of_ours_has_arrived() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as plain:
        sender = trio.socket.from_stdlib_socket(plain)
        before = delivery_of(sender)
        await sender.send(bytes(1000))
        await trio.sleep(0.2)
        after = delivery_of(sender)
        assert before is not None
        assert after is not None
        assert after.acknowledged_bytes - before.acknowledged_bytes == 1000
        assert after.unanswered == 0
        # A reader that is merely busy: its window closes, its system goes on answering.
        with trio.move_on_after(2):
            while True:
                await sender.send(bytes(1 << 20))
        held_up = delivery_of(sender)
        assert held_up is not None
        assert held_up.unanswered == 0
    assert delivery_of(sender) is None
