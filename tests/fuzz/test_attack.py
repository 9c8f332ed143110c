"""Some seconds of what `make fuzz` does for long, against a real peer."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.fuzz.attack import attack, open_victim

SECONDS = 2.0


@pytest.mark.processes
@pytest.mark.real_time
@pytest.mark.slow
async def test_a_real_peer_under_attack_serves_an_honest_client_exactly_and_keeps_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with open_victim(log) as victim:
        try:
            done, steps = await attack(victim, SECONDS, Random(1))
        except AssertionError:
            print(log.read_text()[-4000:])
            raise
    assert done.keys() >= {
        "break_upgrade",
        "break_websocket",
        "break_handshake",
        "break_frames",
        "break_questions",
        "break_answers",
    }
    assert steps > 0
