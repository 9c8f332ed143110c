"""Peers of one local network find each other, and members of a private swarm only their own."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from peerd import peer_parts
from peerd.discovery.lan import MAX_NEIGHBOURS, RETRY_S, SERVICE, Multicast, Sighting, addresses_of, tag_of
from peerd.discovery.mdns import open_zeroconf
from peerd.peer import Peer, open_configured
from peerd.peer_parts import PeerConfig
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import Identity
from peerd.testing.network import MemoryNetwork

EPOCH = 1_800_000_000.0
KEY, OTHER_KEY = bytes(range(32)), bytes(32)


@dataclass(eq=False)
class Member:
    """What one peer announces, and where it hears the others."""

    lan: Lan
    send: trio.MemorySendChannel[Sighting]
    sightings: trio.MemoryReceiveChannel[Sighting]
    said: Sighting | None = None

    async def announce(self, sighting: Sighting | None) -> None:
        await trio.lowlevel.checkpoint()
        self.said = sighting
        self.lan.tell(sighting)


@dataclass
class Lan:
    """A network in which all hear all, also themselves, as multicasts are."""

    members: list[Member] = field(default_factory=list)
    heard: list[Sighting] = field(default_factory=list)

    def tell(self, sighting: Sighting | None) -> None:
        if sighting is None:
            return
        self.heard.append(sighting)
        for member in self.members:
            member.send.send_nowait(sighting)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Multicast]:
        send, receive = trio.open_memory_channel[Sighting](1000)
        member = Member(self, send, receive)
        self.members.append(member)
        for other in self.members:
            if other.said is not None:
                send.send_nowait(other.said)
        yield member
        self.members.remove(member)


@dataclass
class World:
    network: MemoryNetwork
    lan: Lan
    stack: AsyncExitStack

    async def peer(self, host: str, *, listens: bool = True, key: bytes | None = None, meets: bool = True) -> Peer:
        config = PeerConfig(
            identity=Identity.from_seed(host.encode().ljust(32)),
            listen=(Multiaddr("ip4", host, 4000),) if listens else (),
            swarm_key=key,
            transport=self.network.transport(host),
            multicast=self.lan.open if meets else None,
            now=lambda: EPOCH + trio.current_time(),
        )
        return await self.stack.enter_async_context(open_configured(config))


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(MemoryNetwork(), Lan(), stack)


def knows(peer: Peer, other: Peer) -> bool:
    return other.peer_id in {contact.peer_id for contact in peer.discovery.contacts()}


A, B, C = "192.168.1.2", "192.168.1.3", "192.168.1.4"


async def test_two_peers_without_a_bootstrap_find_each_other_whoever_was_first() -> None:
    async with world() as around:
        one, other = await around.peer(A), await around.peer(B)
        await trio.sleep(10)
        assert knows(one, other)
        assert knows(other, one)


async def test_a_client_finds_and_is_not_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    # It listens nowhere, so only its machine can say in which network it is.
    monkeypatch.setattr(peer_parts, "own_networks", lambda: (Multiaddr("ip4", A, 0),))
    async with world() as around:
        client, server = await around.peer(A, listens=False), await around.peer(B)
        await trio.sleep(10)
        assert knows(client, server)
        assert [sighting.hosts for sighting in around.lan.heard] == [(B,)]


async def test_a_peer_that_does_not_want_it_neither_finds_nor_is_found() -> None:
    async with world() as around:
        one, other = await around.peer(A, meets=False), await around.peer(B)
        await trio.sleep(10)
        assert not knows(one, other)
        assert not knows(other, one)


async def test_members_of_a_private_swarm_find_each_other_and_nobody_else() -> None:
    async with world() as around:
        one, other = await around.peer(A, key=KEY), await around.peer(B, key=KEY)
        stranger, outsider = await around.peer(C, key=OTHER_KEY), await around.peer("192.168.1.5")
        await trio.sleep(10)
        assert knows(one, other)
        assert knows(other, one)
        for apart in (stranger, outsider):
            assert not any(knows(apart, peer) or knows(peer, apart) for peer in (one, other))


async def test_an_announcement_of_a_private_swarm_holds_neither_key_nor_name_and_changes_with_each_start() -> None:
    async with world() as around:
        async with AsyncExitStack() as first:
            peer = await World(around.network, around.lan, first).peer(A, key=KEY)
            peer_id = str(peer.peer_id)
            await trio.sleep(5)
        await around.peer(A, key=KEY)
        await trio.sleep(5)
    before, after = around.lan.heard
    said = json.dumps([repr(before), repr(after)])
    assert peer_id not in said
    assert KEY.hex() not in said
    assert before.words.keys() == after.words.keys() == {"v", "tag"}
    assert before.label != after.label
    assert before.words["tag"] != after.words["tag"]


async def test_what_is_said_of_an_open_swarm_is_where_the_peer_listens_and_its_name() -> None:
    async with world() as around:
        peer = await around.peer(A)
        await trio.sleep(5)
        assert around.lan.heard == [
            Sighting(around.lan.heard[0].label, (A,), 4000, {"v": "1", "peer": str(peer.peer_id)})
        ]


async def test_a_peer_on_the_internet_or_on_loopback_is_not_announced() -> None:
    async with world() as around:
        await around.peer("8.8.8.8")
        await around.peer("127.0.0.1")
        await trio.sleep(5)
        assert around.lan.heard == []


NOISE = [
    Sighting("none", ("192.168.1.9",), 1, {}),
    Sighting("later", ("192.168.1.9",), 1, {"v": "2", "peer": "12D3"}),
    Sighting("junk", ("192.168.1.9",), 1, {"v": "1", "peer": "12D3KooW\x1b"}),
    Sighting("tagged", ("192.168.1.9",), 1, {"v": "1", "tag": "ä" * 100}),
    Sighting("nowhere", ("not an address", "", "0.0.0.0", "192.168.1.9%eth0"), 0, {"v": "1", "peer": "12D3"}),
]


@pytest.mark.parametrize("key", [None, KEY], ids=["open", "private"])
async def test_nonsense_is_passed_over_and_the_next_is_met(key: bytes | None) -> None:
    async with world() as around:
        one = await around.peer(A, key=key)
        for sighting in NOISE:
            around.lan.tell(sighting)
        other = await around.peer(B, key=key)
        await trio.sleep(10)
        assert knows(one, other)


async def test_only_the_network_s_own_addresses_are_dialled() -> None:
    async with world() as around:
        await around.peer(A)
        victim = await around.peer("10.0.0.5", meets=False)
        liar = Sighting("liar", ("8.8.8.8", "127.0.0.1", "10.0.0.5"), 4000, {"v": "1", "peer": str(victim.peer_id)})
        around.lan.tell(liar)
        await trio.sleep(10)
        assert [dialled for dialled in around.network.dialled if dialled[0] == A] == []


async def test_one_that_does_not_answer_is_asked_again_only_after_a_while() -> None:
    async with world() as around:
        await around.peer(A)
        gone = Identity.from_seed(b"x" * 32).peer_id
        for _ in range(5):
            around.lan.tell(Sighting("gone", (B,), 4000, {"v": "1", "peer": str(gone)}))
            await trio.sleep(1)
        first = len(around.network.dialled)
        await trio.sleep(RETRY_S)
        around.lan.tell(Sighting("gone", (B,), 4000, {"v": "1", "peer": str(gone)}))
        await trio.sleep(10)
        assert 0 < first < len(around.network.dialled)


async def test_only_a_neighbour_that_answers_shows_that_the_swarm_is_in_this_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer_parts, "own_networks", lambda: (Multiaddr("ip4", A, 0),))
    async with world() as around:
        client = await around.peer(A, listens=False)
        gone = Identity.from_seed(b"x" * 32).peer_id
        around.lan.tell(Sighting("gone", (B,), 4000, {"v": "1", "peer": str(gone)}))
        await trio.sleep(20)
        assert (A, B) in around.network.dialled
        assert client.discovery.may_dial([Multiaddr("ip4", B, 1)]) == ()
        await around.peer(C)
        await trio.sleep(20)
        assert client.discovery.may_dial([Multiaddr("ip4", B, 1)]) == (Multiaddr("ip4", B, 1),)


async def test_a_flood_of_names_is_forgotten_in_the_end() -> None:
    async with world() as around:
        one = await around.peer(A)
        for number in range(2 * MAX_NEIGHBOURS):
            around.lan.tell(Sighting(f"{number}", (B,), 9, {"v": "1", "peer": str(one.peer_id)}))
        await trio.sleep(2 * RETRY_S)
        other = await around.peer(C)
        await trio.sleep(10)
        assert knows(one, other)


async def test_peers_of_other_swarms_take_no_places_of_our_own() -> None:
    async with world() as around:
        one = await around.peer(A, key=KEY)
        for number in range(2 * MAX_NEIGHBOURS):
            words = {"v": "1", "tag": tag_of(OTHER_KEY, f"{number}")}
            around.lan.tell(Sighting(f"{number}", (C,), 9, words))
        other = await around.peer(B, key=KEY, meets=False)
        around.lan.tell(Sighting("ours", (B,), 4000, {"v": "1", "tag": tag_of(KEY, "ours")}))
        await trio.sleep(10)
        assert knows(one, other)


async def test_places_where_nobody_answers_hold_no_member_up() -> None:
    async with world() as around:
        one = await around.peer(A, key=KEY)
        around.network.partition(A, "192.168.1.9")
        for number in range(6):
            words = {"v": "1", "tag": tag_of(KEY, f"{number}")}
            around.lan.tell(Sighting(f"{number}", ("192.168.1.9",), 9, words))
        other = await around.peer(B, key=KEY, meets=False)
        around.lan.tell(Sighting("ours", (B,), 4000, {"v": "1", "tag": tag_of(KEY, "ours")}))
        await trio.sleep(5)
        assert knows(one, other)


def test_addresses_are_read_strictly() -> None:
    mixed = Sighting("x", ("192.168.1.2", "192.168.1.2", "fe80::1", "::1", "1.2.3"), 4000)
    assert [str(address) for address in addresses_of(mixed)] == [
        "/ip4/192.168.1.2/tcp/4000/ws",
        "/ip6/fe80::1/tcp/4000/ws",
    ]
    assert addresses_of(replace(mixed, port=0)) == ()


def test_a_tag_is_of_one_swarm_and_one_label() -> None:
    assert len({tag_of(key, label) for key in (KEY, OTHER_KEY) for label in "ab"}) == 4


def test_the_specification_names_what_is_said() -> None:
    page = (Path(__file__).parents[3] / "spec/discovery/lan.md").read_text()
    assert SERVICE.removesuffix(".") in page
    assert tag_of(KEY, "0123456789abcdef") in page


@pytest.mark.real_time
@pytest.mark.slow
async def test_real_multicasts_arrive_with_all_that_was_said_and_follow_changes() -> None:
    pytest.importorskip("zeroconf")
    async with open_zeroconf() as one, open_zeroconf() as other:
        for host, port in (("192.168.77.1", 4000), ("192.168.77.2", 4001)):
            said = Sighting(f"{port:016x}", (host,), port, {"v": "1", "peer": "12D3x"})
            await one.announce(said)
            with trio.move_on_after(10):
                while await other.sightings.receive() != said:
                    pass
                continue
            pytest.skip("this machine's network passes on no multicasts")


class FakeZeroconf:
    """The package's thread that browses, which passes names to our handler until one raises."""

    class Error(Exception):
        pass

    class ServiceStateChange(Enum):
        Added, Removed = 1, 2

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.changed: Callable[..., None] | None = None

    def Zeroconf(self) -> FakeZeroconf:
        return self

    def ServiceBrowser(self, _zeroconf: object, _service: str, handlers: list[Callable[..., None]]) -> FakeZeroconf:
        [self.changed] = handlers
        return self

    def get_service_info(self, _service: str, name: str, timeout: int) -> object:
        assert timeout > 0
        self.asked.append(name)
        if "\x01" in name:
            raise self.Error("control characters")
        return SimpleNamespace(port=4000, properties={b"v": b"1"}, parsed_addresses=lambda: [A])

    def announced(self, label: str) -> None:
        assert self.changed is not None
        self.changed(self, SERVICE, f"{label}.{SERVICE}", self.ServiceStateChange.Added)

    def cancel(self) -> None:
        # It passes on what waits before it ends.
        self.announced("late")

    def close(self) -> None:
        pass


@pytest.mark.real_time
async def test_a_name_that_the_package_refuses_is_passed_over_and_the_end_waits_for_no_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeZeroconf()
    monkeypatch.setitem(sys.modules, "zeroconf", fake)
    async with open_zeroconf() as multicast:
        for label in ("a\x01b", "good"):
            await trio.to_thread.run_sync(fake.announced, label)
        assert await multicast.sightings.receive() == Sighting("good", (A,), 4000, {"v": "1"})
    assert fake.asked == [f"a\x01b.{SERVICE}", f"good.{SERVICE}"]


@pytest.mark.real_time
async def test_a_machine_too_busy_to_announce_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The package waits ten seconds for its own thread, and then raises, also when it is closed."""
    caplog.set_level(logging.INFO)
    fake = FakeZeroconf()

    def busy(*_arguments: object) -> None:
        raise fake.Error

    monkeypatch.setattr(fake, "register_service", busy, raising=False)
    monkeypatch.setattr(fake, "close", busy)
    monkeypatch.setattr(fake, "ServiceInfo", lambda *_arguments, **_fields: None, raising=False)
    monkeypatch.setitem(sys.modules, "zeroconf", fake)
    async with open_zeroconf() as multicast:
        await multicast.announce(Sighting("x", (A,), 1))
    assert "is not announced" in caplog.text
    assert "not taken back" in caplog.text


@pytest.mark.real_time
@pytest.mark.parametrize("error", [OSError("no such device"), RuntimeError("No interfaces to listen on")], ids=repr)
async def test_without_a_network_nothing_is_found_and_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setitem(sys.modules, "zeroconf", SimpleNamespace(Zeroconf=fail))
    async with open_zeroconf() as nothing:
        await nothing.announce(Sighting("x", (A,), 1))
        with pytest.raises(trio.WouldBlock):
            nothing.sightings.receive_nowait()


async def test_without_the_package_nothing_is_found_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_sync(work, *arguments):
        await trio.lowlevel.checkpoint()
        return work(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    async with open_zeroconf() as nothing:
        await nothing.announce(Sighting("x", (A,), 1))
        with pytest.raises(trio.WouldBlock):
            nothing.sightings.receive_nowait()
