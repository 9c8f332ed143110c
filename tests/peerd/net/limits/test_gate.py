"""How many peers the limit of open files lets in."""

from __future__ import annotations

import pytest

from peerd.net.limits.gate import MAX_CONNECTIONS, MAX_UNPROVEN, RESERVED, Places, places


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (2**63 - 1, Places(MAX_CONNECTIONS, MAX_UNPROVEN)),
        (8192, Places(MAX_CONNECTIONS, MAX_UNPROVEN)),
        # What a shell usually gives.
        (1024, Places(1024 - RESERVED - MAX_UNPROVEN, MAX_UNPROVEN)),
        (64, Places(settled=24, unproven=8)),
        (4, Places(1, 1)),
    ],
)
def test_connections_leave_descriptors_for_everything_else(limit: int, expected: Places) -> None:
    assert places(limit) == expected


@pytest.mark.parametrize("limit", [16, 64, 100, 256, 1000, 1024, 1216, 4096])
def test_peers_and_strangers_together_never_take_the_reserve(limit: int) -> None:
    room = places(limit)
    assert room.settled + room.unproven <= limit - min(RESERVED, limit // 2)
