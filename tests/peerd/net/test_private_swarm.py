"""A private swarm on real sockets: a peer with the key can join, and one without learns nothing."""

from __future__ import annotations

import pytest
import trio

from peerd.peer import open_peer
from peerd.protocol.errors import PeerFault

pytestmark = pytest.mark.real_time

LISTEN = "/ip4/127.0.0.1/tcp/0/ws"
KEY, OTHER = b"k" * 32, b"o" * 32


async def test_peers_with_the_key_meet():
    async with (
        open_peer(listen=[LISTEN], swarm_key=KEY) as first,
        open_peer(bootstrap=first.addresses, swarm_key=KEY) as second,
    ):
        with trio.fail_after(10):
            while first.peer_id not in second.connections.live:
                await trio.sleep(0.01)


@pytest.mark.parametrize("key", [None, OTHER], ids=["no key", "another key"])
async def test_a_peer_without_the_key_is_turned_away(key):
    async with open_peer(listen=[LISTEN], swarm_key=KEY) as first, open_peer(swarm_key=key) as stranger:
        with pytest.raises(PeerFault):
            await stranger.connections.connect(first.peer_id, first.connections.listen_addresses)
        assert not first.connections.live
        assert not stranger.connections.live


async def test_a_stranger_that_names_no_peer_does_not_learn_the_peer_id():
    async with open_peer(listen=[LISTEN], swarm_key=KEY) as first, open_peer() as stranger:
        with pytest.raises(PeerFault) as caught:
            await stranger.connections.connect(None, first.connections.listen_addresses)
        assert str(first.peer_id) not in str(caught.value)
