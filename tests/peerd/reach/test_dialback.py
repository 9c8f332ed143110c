"""Dialling back: judges that lie, and peers that would misuse us."""

from __future__ import annotations

from functools import partial
from ipaddress import ip_address

import pytest
import trio
import trio.lowlevel

from peerd.net.connections import Connections, Stream
from peerd.net.dial_policy import ANYWHERE
from peerd.peer import Peer
from peerd.protocol.errors import Overloaded, RemoteProtocolError, StreamReset, UnsupportedFeature
from peerd.protocol.messages.dialback import DIALBACK_PROTOCOL, Dialled, DialMe
from peerd.protocol.messages.session import Failure
from peerd.reach.dialback import MAX_AT_ONCE, PAUSE_S, ask_to_be_dialled
from peerd.routing.reach.verdict import Reach
from tests.fakes.reach_fixture import NEIGHBOUR, PORT, PUBLIC, ROUTER, hello_with, reach, until, world


async def test_one_lying_judge_among_three_changes_nothing() -> None:
    async with world() as net:
        internet = await net.internet(3)

        async def lie(stream: Stream) -> None:
            async with stream:
                asked = DialMe.from_header((await stream.receive()).header)
                ip = stream.connection.remote_ip
                assert ip is not None
                await stream.send(Dialled(ip, ("reached",) * len(asked.ports)).to_header())

        internet[1].connections.handlers[DIALBACK_PROTOCOL] = lie
        peer = await net.at_home()
        await until(reach(peer, Reach.PRIVATE), within_s=60)


async def test_strangers_that_dial_us_are_neither_believed_nor_asked() -> None:
    async with world() as net:
        internet = await net.internet(3)
        peer = internet[2]
        await until(reach(peer, Reach.PUBLIC), within_s=15)
        asked = 0

        async def lie(stream: Stream) -> None:
            nonlocal asked
            asked += 1
            async with stream:
                await stream.send(Dialled(ip_address(PUBLIC[2]), ("silent",)).to_header())

        net.bootstrap = ()
        for number, sees in enumerate(["9.9.9.9"] * 6 + [PUBLIC[2]] * 2):
            stranger = await net.open(f"8.8.{number}.8", listen=[])
            introduction = stranger.connections._introduction
            introduction.hello_to = partial(hello_with, introduction.hello_to, sees)
            stranger.connections.handlers[DIALBACK_PROTOCOL] = lie
            await stranger.connections.connect(peer.peer_id, peer.addresses)
            await trio.sleep(1)
            assert not peer.connections.live[stranger.peer_id].dialled
        for _ in range(3):
            await trio.sleep(PAUSE_S)
            peer.reachability.check_soon()
        assert [str(ip) for ip in peer.reachability.here.observed] == [PUBLIC[2]]
        assert peer.reachability.reach is Reach.PUBLIC
        assert not asked


async def _ask(stranger: Connections, peer: Peer, header: dict[str, object]) -> Dialled:
    opened = stranger.open_stream(peer.peer_id, DIALBACK_PROTOCOL, addresses=peer.addresses, policy=ANYWHERE)
    async with await opened as stream:
        await stream.send(header)
        answer = (await stream.receive()).header
    if answer["type"] == Failure.TYPE:
        raise Failure.from_header(answer).error
    return Dialled.from_header(answer)


async def test_only_the_askers_own_address_is_dialled_whatever_it_asks() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        victim = await net.open("5.8.8.8")
        stranger = await net.open("5.9.9.9", listen=[])
        net.dialled.clear()
        question = DialMe((PORT, 22)).to_header() | {"ip": "5.8.8.8", "addresses": [str(victim.addresses[0])]}
        answer = await _ask(stranger.connections, peer, question)
        assert (str(answer.ip), answer.outcomes) == ("5.9.9.9", ("refused", "refused"))
        assert sorted(set(net.dialled) - {("5.9.9.9", f"{PUBLIC[0]}:{PORT}")}) == [
            (PUBLIC[0], f"5.9.9.9:{port}") for port in (22, PORT)
        ]


async def test_another_peer_at_the_askers_address_is_not_taken_for_the_asker() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        net.network.forward(ROUTER, PORT, NEIGHBOUR)
        await net.at_home(NEIGHBOUR)
        stranger = await net.at_home(listen=[])
        # Until the neighbour's own dial-back is long enough ago.
        await trio.sleep(PAUSE_S + 10)
        answer = await _ask(stranger.connections, peer, DialMe((PORT,)).to_header())
        assert answer.outcomes == ("wrong_peer",)


async def test_an_address_is_dialled_once_a_minute_for_all_askers_from_there() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        one, other = await net.at_home(listen=[]), await net.at_home(NEIGHBOUR, listen=[])
        await _ask(one.connections, peer, DialMe((PORT,)).to_header())
        for asker in (one, other):
            with pytest.raises(Overloaded, match="less than 60 s"):
                await _ask(asker.connections, peer, DialMe((PORT,)).to_header())
        await trio.sleep(PAUSE_S)
        await _ask(other.connections, peer, DialMe((PORT,)).to_header())


async def test_a_storm_of_askers_costs_a_few_dials_at_a_time() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        askers = []
        for number in range(30):
            # Behind routers that answer nothing, so that each dial takes its whole time.
            net.network.put_behind_nat(f"5.0.{number}.1", f"5.0.{number}.1")
            askers.append(await net.open(f"5.0.{number}.1", listen=[]))
        net.dialled.clear()
        turned_away = 0

        async def ask(asker: Peer) -> None:
            nonlocal turned_away
            try:
                answer = await _ask(asker.connections, peer, DialMe((PORT,)).to_header())
                assert answer.outcomes == ("silent",)
            except Overloaded:
                turned_away += 1

        async with trio.open_nursery() as nursery:
            for asker in askers:
                nursery.start_soon(ask, asker)
        assert turned_away == 30 - MAX_AT_ONCE
        assert len([one for one in net.dialled if one[0] == PUBLIC[0]]) == MAX_AT_ONCE


async def test_a_public_peer_dials_nobody_in_a_private_range() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        # As behind a proxy on the same machine, or with an interface in another LAN.
        for host in ("127.0.0.1", "10.0.0.7", "192.0.2.1"):
            stranger = await net.open(host, listen=[])
            net.dialled.clear()
            with pytest.raises(UnsupportedFeature, match="dial nobody"):
                await _ask(stranger.connections, peer, DialMe((22,)).to_header())
            assert not [one for one in net.dialled if one[0] == PUBLIC[0]]


async def test_a_peer_of_a_lan_dials_its_neighbours_only() -> None:
    async with world() as net:
        peer = await net.open("192.168.1.9")
        neighbour = await net.open("192.168.1.10", listen=[])
        assert (await _ask(neighbour.connections, peer, DialMe((PORT,)).to_header())).outcomes == ("refused",)
        elsewhere = await net.open("10.0.0.10", listen=[])
        with pytest.raises(UnsupportedFeature):
            await _ask(elsewhere.connections, peer, DialMe((PORT,)).to_header())


async def test_a_probe_leaves_the_connection_between_both_as_it_was() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        asker = await net.open("5.9.9.9")
        connection = asker.connections.live[peer.peer_id]
        answer = await ask_to_be_dialled(connection, [PORT])
        assert answer.outcomes == ("reached",)
        await trio.sleep(20)
        assert asker.connections.live == {peer.peer_id: connection}
        assert connection.lost is None


@pytest.mark.parametrize(
    "header",
    [
        {"type": "dial_me"},
        {"type": "dial_me", "ports": []},
        {"type": "dial_me", "ports": [0]},
        {"type": "dial_me", "ports": [1, 2, 3, 4, 5]},
        {"type": "dial_me", "ports": [1, 1]},
        {"type": "ping"},
    ],
    ids=str,
)
async def test_a_malformed_question_is_refused_and_dials_nobody(header: dict[str, object]) -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        stranger = await net.open("5.9.9.9", listen=[])
        net.dialled.clear()
        stream = await stranger.connections.open_stream(peer.peer_id, DIALBACK_PROTOCOL, addresses=peer.addresses)
        async with stream:
            await stream.send(header)
            answer = await stream.receive()
        assert Failure.from_header(answer.header).error.code == "invalid"
        assert not [one for one in net.dialled if one[0] == PUBLIC[0]]


async def test_an_answer_of_another_length_is_the_judges_fault() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)

        async def answer(stream: Stream) -> None:
            async with stream:
                await stream.receive()
                await stream.send({"type": "dialled", "ip": "5.9.9.9", "outcomes": ["reached"] * 2})

        peer.connections.handlers[DIALBACK_PROTOCOL] = answer
        stranger = await net.open("5.9.9.9", listen=[])
        connection = await stranger.connections.connect(peer.peer_id, peer.addresses)
        with pytest.raises(RemoteProtocolError, match="2 ports, not 1"):
            await ask_to_be_dialled(connection, [PORT])


async def test_a_dht_client_answers_no_question_and_leaves_the_tables_for_it() -> None:
    async with world() as net:
        internet = await net.internet(2)
        peer = await net.at_home()
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        # Another peer still believes an old announcement.
        stream = internet[0].connections.live[peer.peer_id].open_stream("/peerd/dht/1")
        async with stream:
            await stream.send({"type": "ping"})
            with pytest.raises(StreamReset):
                await stream.receive()
