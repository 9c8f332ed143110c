"""How many peers the limit of open files lets in."""

from __future__ import annotations

import pytest

from peerd.net.limits.gate import MAX_CONNECTIONS, MAX_UNPROVEN, RESERVED, ConnectionLimits, connection_limits


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (2**63 - 1, ConnectionLimits(MAX_CONNECTIONS, MAX_UNPROVEN)),
        (8192, ConnectionLimits(MAX_CONNECTIONS, MAX_UNPROVEN)),
        # What a shell usually gives.
        (1024, ConnectionLimits(1024 - RESERVED - MAX_UNPROVEN, MAX_UNPROVEN)),
        (64, ConnectionLimits(settled=24, unproven=8)),
        (4, ConnectionLimits(1, 1)),
    ],
)
def test_connections_leave_descriptors_for_everything_else(limit: int, expected: ConnectionLimits) -> None:
    assert connection_limits(limit) == expected


@pytest.mark.parametrize("limit", [16, 64, 100, 256, 1000, 1024, 1216, 4096])
def test_peers_and_strangers_together_never_take_the_reserve(limit: int) -> None:
    room = connection_limits(limit)
    assert room.settled + room.unproven <= limit - min(RESERVED, limit // 2)
