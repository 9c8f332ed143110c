"""The invitation that a daemon makes: which addresses it gives, and what it says of them."""

from __future__ import annotations

import sys

import httpx
import pytest
import trio

from peerd.api.web.invitations import addresses_to_give, described
from peerd.api.web.qr import qr_rows
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import PeerId, peer_id_of
from peerd.protocol.invitation import Invitation, swarm_digest
from tests.fakes.api_fixture import TOKEN

ONE, TWO, THREE = (peer_id_of(bytes([number]) * 32) for number in range(3))


def at(host: str, peer_id: PeerId | None = None, port: int = 31330) -> Multiaddr:
    return Multiaddr("ip4", host, port, peer_id=peer_id)


def given(*peers: tuple[PeerId, list[Multiaddr]]) -> list[str]:
    return [str(address) for address in addresses_to_give(peers)]


def test_each_peer_is_named_once_at_its_widest_address_and_public_peers_come_first() -> None:
    found = given(
        (ONE, [at("127.0.0.1"), at("192.168.1.7")]),
        (TWO, [at("10.0.0.1"), at("8.8.8.8"), at("9.9.9.9")]),
        (THREE, [at("192.168.1.8")]),
    )
    assert found == [str(at("8.8.8.8", TWO)), str(at("192.168.1.7", ONE))]


def test_this_machine_s_own_addresses_are_given_only_where_there_are_no_others() -> None:
    assert given((ONE, [at("127.0.0.1")]), (TWO, [at("192.168.1.8")])) == [str(at("192.168.1.8", TWO))]
    assert given((ONE, [at("127.0.0.1")])) == [str(at("127.0.0.1", ONE))]


def test_what_cannot_be_dialled_is_not_given() -> None:
    assert given((ONE, [at("0.0.0.0"), at("192.168.1.7", port=0)]), (TWO, [])) == []


@pytest.mark.parametrize(
    ("host", "reach"), [("8.8.8.8", "internet"), ("192.168.1.8", "network"), ("127.0.0.1", "machine")]
)
def test_it_says_from_where_the_link_works(host: str, reach: str) -> None:
    assert described(Invitation((at(host, ONE),)))["reach"] == reach


def test_a_qr_code_is_square_and_says_what_a_camera_would_read() -> None:
    pytest.importorskip("segno")
    rows = qr_rows("peerd://join/1,peer=x")
    assert rows is not None
    assert {len(row) for row in rows} == {len(rows)}
    # The finder pattern in three corners.
    for corner in (rows[0][:7], rows[0][-7:], rows[-1][:7]):
        assert corner == "1111111"
    assert rows[0][7] == "0"
    assert qr_rows("x" * 5000) is None


def test_without_the_library_there_is_a_link_and_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segno", None)
    qr_rows.cache_clear()
    assert described(Invitation((at("8.8.8.8", ONE),)))["qr"] is None
    qr_rows.cache_clear()


@pytest.mark.real_time
async def test_a_daemon_invites_to_its_models_and_never_gives_its_key(open_daemon) -> None:
    async with open_daemon() as daemon:

        def get(query: str) -> httpx.Response:
            headers = {"authorization": f"Bearer {TOKEN}"}
            return httpx.get(f"{daemon.url}/peerd/v1/invitation{query}", headers=headers)

        first = await trio.to_thread.run_sync(get, "")
        same = await trio.to_thread.run_sync(get, "?model=bytes")
        other = await trio.to_thread.run_sync(get, "?model=none")
        found = Invitation.parse(first.json()["link"])
        assert first.json() == same.json()
        assert (found.model, found.swarm, found.key) == ("bytes", None, None)
        assert {address.peer_id for address in found.peers} <= {host.peer_id for host in daemon.swarm.hosts}
        assert other.status_code == 404
        daemon.client.connections.swarm = swarm_digest(bytes(32))
        private = (await trio.to_thread.run_sync(get, "")).json()
        assert private["private"]
        assert (Invitation.parse(private["link"]).swarm, Invitation.parse(private["link"]).key) == (
            swarm_digest(bytes(32)),
            None,
        )
        for host in daemon.swarm.hosts:
            host.online = False
        nobody = await trio.to_thread.run_sync(get, "")
        assert (nobody.status_code, nobody.json()["error"]["code"]) == (409, "no_address")
