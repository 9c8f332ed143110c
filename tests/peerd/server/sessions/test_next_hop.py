"""Links: which tickets open them, which addresses are dialled, and what an epoch ends."""

import pytest
import torch
import trio

from peerd.exchange.step_tensors import encoded
from peerd.net.dial_policy import DialPolicy
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.encoding.tensors import TensorHeader, decode_tensor
from peerd.protocol.errors import CallerError, RemoteProtocolError, StreamReset, Superseded, TicketRefused
from peerd.protocol.identity import Identity
from peerd.protocol.messages.session import (
    LINK_PROTOCOL,
    Failure,
    Link,
    LinkDown,
    Linked,
    NextHop,
    Output,
    Route,
    Routed,
    Step,
)
from peerd.protocol.records.envelope import ModelRecord, PeerRecord, sign_record
from peerd.protocol.rows import RowSlice
from peerd.protocol.span import Span
from peerd.server.server import DIALS_AT_ONCE
from peerd.server.sessions.session_table import LINK_PATIENCE_S
from peerd.testing.fake_engine import fake_forward

WIDTH = 8
SESSION = b"s" * 16


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 251, (count, WIDTH), generator=generator).float()


async def send(stream, hidden, seq=1, start=0, *, epoch=0, **fields):
    message = Step(epoch=epoch, seq=seq, rows=(RowSlice(0, start, len(hidden)),), **fields)
    await stream.send(*encoded(message, hidden, "exact", torch.float32))


async def next_result(stream):
    """The next output: its `seq` and values."""
    raw = await stream.receive(max_body=2**22)
    output = Output.from_header(raw.header)
    return output.seq, decode_tensor(TensorHeader.from_fields(output.tensor, max_elements=2**20), raw.body)


async def link(upstream, host, ticket, session=SESSION):
    """A link stream from `upstream`, and what it is answered with."""
    stream = await upstream.stream(host, LINK_PROTOCOL)
    said = await upstream.ask(stream, Link(session=session, ticket=ticket))
    return stream, said


async def parties(swarm):
    """A host of blocks 4 to 8, the client whose session it has as hop 1, and a peer that may be its upstream."""
    host = await swarm.serve(4, 8)
    client, upstream = await swarm.caller(), await swarm.caller()
    control = await client.open(host, hop=1)
    return host, client, upstream, control


# Tickets.


async def test_a_ticket_opens_a_link_and_steps_on_it_are_answered_to_the_client(open_swarm):
    async with open_swarm() as swarm:
        host, client, upstream, control = await parties(swarm)
        stream, said = await link(upstream, host, client.ticket(upstream.identity.peer_id, host))
        assert said == Linked(taken=0)
        row = tokens(5)
        await send(stream, row)
        seq, result = await next_result(control)
        assert seq == 1
        assert torch.equal(result, fake_forward(row, Span(4, 8))[-1:])


STRANGER = Identity.from_seed(b"x" * 32)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"signer": STRANGER}, "not signed"),
        ({"sender": STRANGER.peer_id}, "another sender"),
        ({"receiver": STRANGER.peer_id}, "another receiver"),
        ({"hop": 2}, "no such session"),
        ({"session": b"t" * 16}, "no such session"),
        ({"expires": 1_800_000_000 - 100}, "expired"),
    ],
)
async def test_a_ticket_that_does_not_fit_is_refused(open_swarm, fields, text):
    async with open_swarm() as swarm:
        host, client, upstream, control = await parties(swarm)
        sender = fields.pop("sender", upstream.identity.peer_id)
        stream, said = await link(upstream, host, client.ticket(sender, host, **fields))
        assert isinstance(said, Failure)
        assert isinstance(said.error, TicketRefused)
        assert text in str(said.error)
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()
        await send(control, tokens(1))
        assert (await next_result(control))[0] == 1


@pytest.mark.parametrize("damage", [slice(0, 10), slice(0, 0, -1), slice(3, None)])
async def test_bytes_that_are_no_ticket_are_refused(open_swarm, damage):
    async with open_swarm() as swarm:
        host, client, upstream, _ = await parties(swarm)
        ticket = client.ticket(upstream.identity.peer_id, host)[damage] or b"?"
        _, said = await link(upstream, host, ticket)
        assert isinstance(said.error, TicketRefused)


async def test_one_flipped_bit_anywhere_spoils_a_ticket(open_swarm):
    async with open_swarm() as swarm:
        host, client, upstream, _ = await parties(swarm)
        ticket = client.ticket(upstream.identity.peer_id, host)
        for at in range(0, len(ticket), 7):
            forged = bytearray(ticket)
            forged[at] ^= 1
            _, said = await link(upstream, host, bytes(forged))
            assert isinstance(said, Failure)
            assert isinstance(said.error, TicketRefused)


async def test_a_stranger_with_a_session_of_the_same_id_keeps_no_link_out(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(4, 8)
        client, stranger, upstream = [await swarm.caller() for _ in range(3)]
        await stranger.open(host, hop=1)
        await client.open(host, hop=1)
        _, said = await link(upstream, host, client.ticket(upstream.identity.peer_id, host))
        assert isinstance(said, Linked)


async def test_a_link_may_come_before_its_session_but_not_long_before(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(4, 8)
        client, upstream = await swarm.caller(), await swarm.caller()
        stream = await upstream.stream(host, LINK_PROTOCOL)
        ticket = client.ticket(upstream.identity.peer_id, host)
        await stream.send(Link(session=SESSION, ticket=ticket).to_header())
        await trio.sleep(LINK_PATIENCE_S - 1)
        await client.open(host, hop=1)
        assert isinstance(await upstream.hear(stream), Linked)

        before = trio.current_time()
        _, said = await link(upstream, host, ticket, session=b"u" * 16)
        assert isinstance(said.error, TicketRefused)
        assert trio.current_time() - before == pytest.approx(LINK_PATIENCE_S, abs=0.1)


async def test_a_session_that_waits_for_room_takes_no_link_yet(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(4, 8, kv_tokens=256)
        other, client, upstream = [await swarm.caller() for _ in range(3)]
        holding = await other.open(host)
        waiting = await client.stream(host)
        await waiting.send(client.opening(host, hop=1, timeout_ms=60_000).to_header())
        stream = await upstream.stream(host, LINK_PROTOCOL)
        ticket = client.ticket(upstream.identity.peer_id, host)
        await stream.send(Link(session=SESSION, ticket=ticket).to_header())
        with trio.move_on_after(3) as silence:
            await stream.receive()
        assert silence.cancelled_caught
        holding.reset("closed")
        assert isinstance(await upstream.hear(stream), Linked)


# Epochs.


async def test_a_higher_epoch_supersedes_the_link_and_a_lower_is_refused(open_swarm):
    async with open_swarm() as swarm:
        host, client, first, control = await parties(swarm)
        second = await swarm.caller()
        old, _ = await link(first, host, client.ticket(first.identity.peer_id, host, epoch=1))
        row = tokens(6)
        await send(old, row[:3], 1, epoch=1)
        assert (await next_result(control))[0] == 1
        new, said = await link(second, host, client.ticket(second.identity.peer_id, host, epoch=2))
        assert said == Linked(taken=1)
        with pytest.raises(StreamReset) as caught:
            await old.receive()
        assert caught.value.reason == Superseded.code
        _, said = await link(first, host, client.ticket(first.identity.peer_id, host, epoch=1))
        assert isinstance(said.error, Superseded)
        await send(new, row[3:], 2, start=3, epoch=2)
        seq, result = await next_result(control)
        assert seq == 2
        assert torch.equal(result, fake_forward(row, Span(4, 8))[-1:])


async def test_what_an_old_link_brought_is_answered_and_what_it_still_brings_is_not(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(4, 8, step_s=1)
        client, first, second = [await swarm.caller() for _ in range(3)]
        control = await client.open(host, hop=1, epoch=1)
        old, _ = await link(first, host, client.ticket(first.identity.peer_id, host, epoch=1))
        row = tokens(7)
        for seq in range(1, 5):
            await send(old, row[seq - 1 : seq], seq, start=seq - 1, epoch=1)
        await trio.sleep(0.1)
        # The first is in a batch and three are queued; the fifth comes by both ways, the old one's too late.
        new, said = await link(second, host, client.ticket(second.identity.peer_id, host, epoch=2))
        assert said == Linked(taken=4)
        await send(new, row[4:5], 5, start=4, epoch=2)
        await send(new, row[5:], 6, start=5, epoch=2)
        expected = fake_forward(row, Span(4, 8))
        for seq, end in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 7)):
            answered, result = await next_result(control)
            assert answered == seq
            assert torch.equal(result, expected[end - 1 : end])
        with trio.move_on_after(30) as silence:
            await control.receive()
        assert silence.cancelled_caught


async def test_a_link_of_a_session_that_ends_is_ended(open_swarm):
    async with open_swarm() as swarm:
        host, client, upstream, control = await parties(swarm)
        stream, _ = await link(upstream, host, client.ticket(upstream.identity.peer_id, host))
        for seq in range(1, 4):
            await send(stream, tokens(60, seq), seq, start=0)
        control.reset("closed")
        with pytest.raises(StreamReset):
            await stream.receive()
        # The batch that is running keeps its pages until it ends.
        await trio.sleep(0.1)
        assert host.server.sessions == 0
        assert host.task.engine.free_tokens == 4096


async def test_a_wrong_message_on_a_link_ends_the_link_and_not_the_session(open_swarm):
    async with open_swarm() as swarm:
        host, client, upstream, control = await parties(swarm)
        stream, _ = await link(upstream, host, client.ticket(upstream.identity.peer_id, host))
        said = await upstream.ask(stream, Route(epoch=7))
        assert isinstance(said.error, RemoteProtocolError)
        stream, said = await link(upstream, host, client.ticket(upstream.identity.peer_id, host, epoch=1))
        assert isinstance(said, Linked)
        await send(stream, tokens(1), epoch=1)
        assert (await next_result(control))[0] == 1


# Dialling.


def addresses(*texts):
    return tuple(Multiaddr.parse(text) for text in texts)


async def told(client, host, after, next_hop):
    """What a client hears of the link from `host` to `after` when it names `next_hop`."""
    stream = await client.open(host, next=next_hop)
    return await client.hear(stream)


async def test_a_next_hops_record_must_be_its_own_and_in_date(open_swarm):
    async with open_swarm() as swarm:
        host, after = await swarm.serve(0, 4), await swarm.serve(4, 8)
        good = (await swarm.caller()).next_hop(host, after)
        now = 1_800_000_000 + trio.current_time()
        own = tuple(str(address) for address in after.connections.listen_addresses)
        forged = bytearray(good.record)
        forged[-1] ^= 1
        wrong = {
            "garbage": b"\xc1 garbage",
            "forged": bytes(forged),
            "expired": sign_record(after.identity, PeerRecord(seq=1, expires=now - 1, addresses=own)).encode(),
            "another kind": sign_record(
                after.identity,
                ModelRecord(seq=1, expires=now + 60, model=b"m" * 32, name="m", hub_id="", revision="", block_count=8),
            ).encode(),
            "ourselves": sign_record(host.identity, PeerRecord(seq=1, expires=now + 60, addresses=own)).encode(),
            "nowhere": sign_record(after.identity, PeerRecord(seq=1, expires=now + 60, addresses=())).encode(),
        }
        for what, record in wrong.items():
            client = await swarm.caller()
            said = await told(client, host, after, NextHop(good.ticket, record))
            assert isinstance(said, LinkDown), what


@pytest.mark.parametrize("host", ["ip4/127.0.0.1", "ip4/192.168.1.9", "dns4/evil"])
@pytest.mark.parametrize("ours", ["/ip4/93.184.216.1/tcp/1/ws", "/ip4/10.0.0.1/tcp/1/ws", "/ip4/0.0.0.0/tcp/1/ws"])
async def test_a_hop_is_not_aimed_at_networks_that_it_does_not_live_in(open_swarm, host, ours):
    async with open_swarm() as swarm:
        hop, after = await swarm.serve(0, 4), await swarm.serve(4, 8)
        swarm.network.names["evil"] = "127.0.0.1"
        hop.connections.strangers_policy = DialPolicy(lambda: addresses(ours))
        client = await swarm.caller()
        await client.open(after, hop=1)
        now = 1_800_000_000 + trio.current_time()
        record = sign_record(after.identity, PeerRecord(seq=1, expires=now + 60, addresses=(f"/{host}/tcp/4000/ws",)))
        ticket = client.ticket(hop.identity.peer_id, after)
        said = await told(client, hop, after, NextHop(ticket, record.encode()))
        assert isinstance(said, LinkDown)
        assert not [dialled for dialled in swarm.network.dialled if dialled[0] == hop.ip]


async def test_a_client_on_the_internet_aims_no_hop_into_the_network_where_it_lives(open_swarm):
    async with open_swarm() as swarm:
        hop, after = await swarm.serve(0, 4), await swarm.serve(4, 8)
        hop.connections.strangers_policy = DialPolicy(lambda: addresses("/ip4/10.0.0.1/tcp/1/ws"))
        neighbour = await swarm.caller()
        swarm.ips = "93.184.216.{}"
        stranger = await swarm.caller()
        for client, taken in ((stranger, False), (neighbour, True)):
            await client.open(after, hop=1)
            said = await told(client, hop, after, client.next_hop(hop, after))
            assert isinstance(said, LinkDown) != taken
            assert bool([dialled for dialled in swarm.network.dialled if dialled[0] == hop.ip]) == taken


async def test_a_client_is_told_nothing_of_what_was_found_where_a_next_hop_should_be(open_swarm):
    async with open_swarm() as swarm:
        host, after, other = [await swarm.serve(0, 4), await swarm.serve(4, 8), await swarm.serve(4, 8)]
        now = 1_800_000_000 + trio.current_time()
        own = str(other.connections.listen_addresses[0])
        texts = {}
        for what, address in {
            "somebody else": own,
            "closed": own.replace("4000", "4001"),
            "no name": "/dns4/nowhere/tcp/1/ws",
            "a relay": own + f"/p2p/{other.peer_id}/p2p-circuit",
        }.items():
            client = await swarm.caller()
            relays = (address,) if "circuit" in address else ()
            ways = () if relays else (address,)
            record = sign_record(after.identity, PeerRecord(seq=1, expires=now + 60, addresses=ways, relays=relays))
            ticket = client.ticket(host.identity.peer_id, after)
            said = await told(client, host, after, NextHop(ticket, record.encode()))
            texts[what] = said.message
        assert len(set(texts.values())) == 1, texts


async def test_a_client_cannot_make_a_hop_dial_as_often_as_it_likes(open_swarm):
    async with open_swarm() as swarm:
        host, after = await swarm.serve(0, 4), await swarm.serve(4, 8)
        client = await swarm.caller()
        stream = await client.open(host, next=client.next_hop(host, after))
        before = trio.current_time()
        for epoch in range(1, 61):
            nobody = Identity.generate()
            target = "/ip4/93.184.216.34/tcp/80/ws"
            record = sign_record(nobody, PeerRecord(seq=1, expires=1_800_000_300, addresses=(target,)))
            ticket = client.ticket(host.identity.peer_id, after, receiver=nobody.peer_id, epoch=epoch)
            await client.ask(stream, Route(epoch=epoch, next=NextHop(ticket, record.encode())))
        assert trio.current_time() - before < 60
        assert 0 < swarm.network.dialled.count((host.ip, "93.184.216.34")) <= DIALS_AT_ONCE + 4


async def test_the_next_hops_refusal_is_told_to_the_client(open_swarm):
    async with open_swarm() as swarm:
        host, after = await swarm.serve(0, 4), await swarm.serve(4, 8)
        client = await swarm.caller()
        await client.open(after, hop=1)
        said = await told(client, host, after, client.next_hop(host, after, hop=2))
        assert isinstance(said, LinkDown)
        assert said.epoch == 0
        assert "no such session" in said.message


async def test_a_route_replays_what_the_replacement_lacks_and_says_so(open_swarm):
    async with open_swarm() as swarm:
        host, after, twin = await swarm.serve(0, 4), await swarm.serve(4, 8), await swarm.serve(4, 8)
        client = await swarm.caller()
        last = await client.open(after, hop=1)
        first = await client.open(host, next=client.next_hop(host, after))
        row = tokens(7)
        await send(first, row)
        await next_result(last)
        swarm.kill(after)
        assert isinstance(await client.hear(first), LinkDown)
        replacement = await client.open(twin, hop=2, epoch=1)
        routed = await client.ask(first, Route(epoch=1, next=client.next_hop(host, twin, hop=2, epoch=1)))
        assert routed == Routed(epoch=1, replayed=7)
        # A hop keeps its last steps as steps, because the last hop may have died before it answered them.
        seq, result = await next_result(replacement)
        assert seq == 1
        assert torch.equal(result, fake_forward(row, Span(0, 8))[-1:])
        more = tokens(9)[7:]
        await send(first, more, 2, start=7, epoch=1)
        seq, result = await next_result(replacement)
        assert seq == 2
        assert torch.equal(result, fake_forward(torch.cat([row, more]), Span(0, 8))[-1:])


# Next hops that do not read.


async def test_a_next_hop_that_does_not_read_holds_that_session_back_and_nobody_else(open_swarm):
    async with open_swarm() as swarm:
        host, after = await swarm.serve(0, 4, batch_tokens=1024), await swarm.serve(4, 8, step_s=10_000)
        client = await swarm.caller()
        await client.open(after, hop=1, max_length=1024, max_steps=2)
        first = await client.open(host, max_length=1024, max_steps=16, next=client.next_hop(host, after))
        for seq in range(1, 17):
            await send(first, tokens(1024, seq), seq)
            await trio.sleep(0.2)
        # The next hop takes two and their credit; two and what the stream holds are on their way.
        assert host.task.engine.positions_computed <= 10 * 1024
        assert after.task.engine.positions_computed == 0
        other = await swarm.client()
        session = await other.session(Span(0, 4))
        before = trio.current_time()
        for position in range(5):
            await session.step(tokens(5)[position : position + 1])
        # Opening takes two round trips more; each step 10 ms of computing and a round trip.
        assert trio.current_time() - before < 0.2
        first.reset("closed")
        await trio.sleep(0.1)
        assert host.server.sessions == 1


async def test_a_next_hop_that_never_answers_is_given_up(open_swarm):
    async with open_swarm() as swarm:
        host, after = await swarm.serve(0, 4), await swarm.serve(4, 8)
        client = await swarm.caller()
        swarm.freeze(after)
        before = trio.current_time()
        said = await told(client, host, after, client.next_hop(host, after))
        assert isinstance(said, LinkDown)
        assert trio.current_time() - before < 25


async def test_errors_of_a_session_are_typed_for_its_client(open_swarm):
    async with open_swarm() as swarm:
        host, client, upstream, control = await parties(swarm)
        stream, _ = await link(upstream, host, client.ticket(upstream.identity.peer_id, host))
        await send(stream, tokens(300))
        said = Failure.from_header((await control.receive()).header)
        assert isinstance(said.error, CallerError)
        assert said.seq == 1
