"""Adapters in a swarm: chosen by name or uploaded by clients, and never mixed up, whichever peers die meanwhile."""

import pytest
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.compute.adapters.lora import PREFIX_K, PREFIX_V, PROMPT, DeepPrompt, LoraAdapter, LoraPair
from peerd.compute.errors import AdapterError
from peerd.exchange.adapter_upload import send_adapter
from peerd.net.limits.owners import Owner
from peerd.protocol.encoding.schema import parse
from peerd.protocol.encoding.tensors import encode_tensor
from peerd.protocol.errors import (
    Evicted,
    InvalidRequest,
    NoChain,
    Overloaded,
    PeerdError,
    PeerFault,
    RemoteProtocolError,
    StreamReset,
    UnsupportedFeature,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.adapters import (
    ADAPTER_PROTOCOL,
    OWN_ADAPTER,
    Granted,
    Loaded,
    MatrixA,
    MatrixB,
    Prompt,
    Upload,
    adapter_id,
)
from peerd.protocol.messages.session import Failure, Step
from peerd.protocol.rows import RowSlice
from peerd.protocol.span import Span
from peerd.server.quotas import AdapterRoom
from peerd.testing.fake_engine import FAKE_LAYER, fake_forward

WIDTH = 8
BLOCKS = Span(0, 9)
POET = adapter_id("poet", bytes(32))
CLERK = adapter_id("clerk", bytes(32))
LIMIT = 10_000


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 251, (count, WIDTH), generator=generator).float()


def lora(seed, blocks=BLOCKS, rank=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        (block, FAKE_LAYER): LoraPair(
            torch.randn(rank, WIDTH, generator=generator), torch.randn(WIDTH, rank, generator=generator), 1.0
        )
        for block in range(blocks.start, blocks.end)
    }


async def serve(swarm, *adapters, spans=((0, 3), (3, 6), (6, 9)), **settings):
    hosts = []
    for start, end in spans:
        host = await swarm.serve(start, end, **settings)
        for name, weights in adapters:
            await host.task.load_adapter(name, weights)
        hosts.append(host)
    return hosts


def expected(row, weights=None):
    return fake_forward(row, BLOCKS, weights)


# The swarm's adapters.


async def test_sessions_with_different_adapters_share_servers_and_each_gets_its_own(open_swarm):
    poet, clerk = lora(1), lora(2)
    async with open_swarm() as swarm:
        await serve(swarm, (POET, poet), (CLERK, clerk))
        client = await swarm.client()
        wanted = {"": None, POET: poet, CLERK: clerk}
        sessions = [(await client.session(BLOCKS, adapter=name), weights) for name, weights in wanted.items()]
        row = tokens(12)

        async def run(session, weights):
            for start in range(0, 12, 3):
                result = await session.step(row[start : start + 3], want="all")
                assert torch.equal(result, expected(row, weights)[start : start + 3])

        async with trio.open_nursery() as nursery:
            for session, weights in sessions:
                nursery.start_soon(run, session, weights)


async def test_a_replacement_has_the_adapter_too(open_swarm):
    poet = lora(1)
    async with open_swarm() as swarm:
        await serve(swarm, spans=[(3, 6)])
        hosts = await serve(swarm, (POET, poet))
        spare = (await serve(swarm, (POET, poet), spans=[(3, 6)]))[0]
        session = await (await swarm.client()).session(BLOCKS, adapter=POET)
        row = tokens(9)
        assert torch.equal(await session.step(row[:5]), expected(row, poet)[4:5])
        used = next(host for host in (hosts[1], spare) if session.chain[1].peer == str(host.peer_id))
        swarm.kill(used)
        assert torch.equal(await session.step(row[5:9]), expected(row, poet)[8:9])
        left = hosts[1] if used is spare else spare
        assert session.chain[1].peer == str(left.peer_id)


async def test_blocks_that_nobody_serves_with_the_adapter_are_named(open_swarm):
    async with open_swarm() as swarm:
        await serve(swarm, (POET, lora(1)), spans=[(0, 3)])
        await serve(swarm, spans=[(3, 9)])
        session = await (await swarm.client()).session(BLOCKS, adapter=POET)
        with pytest.raises(NoChain, match=f"serves blocks 3:9 with the adapter {POET}"):
            await session.open()


async def test_an_adapter_that_a_server_lacks_is_refused_at_open_with_what_is_there(open_swarm):
    async with open_swarm() as swarm:
        (host,) = await serve(swarm, (POET, lora(1)), spans=[(0, 3)])
        caller = await swarm.caller()
        error = await caller.refused(host, adapter=CLERK)
        assert isinstance(error, UnsupportedFeature)
        assert str(error) == f"this peer has no adapter '{CLERK}'; it has {POET}"


async def test_a_withdrawn_adapter_serves_its_sessions_to_their_end_and_nobody_else(open_swarm):
    poet = lora(1)
    async with open_swarm() as swarm:
        (host,) = await serve(swarm, (POET, poet), spans=[(0, 9)])
        client, caller = await swarm.client(), await swarm.caller()
        session = await client.session(BLOCKS, adapter=POET)
        row = tokens(6)
        await session.step(row[:3])
        host.task.withdraw_adapter(POET)
        assert isinstance(await caller.refused(host, adapter=POET), UnsupportedFeature)
        assert torch.equal(await session.step(row[3:]), expected(row, poet)[5:])
        assert host.task.engine.adapters == {POET}
        session.close()
        await trio.sleep(1)
        assert host.task.engine.adapters == frozenset()
        with pytest.raises(KeyError):
            host.task.withdraw_adapter(POET)
        # The name is free again.
        await host.task.load_adapter(POET, poet)
        assert host.task.adapters == {POET}


# A client's own.


async def test_a_clients_own_adapter_runs_on_every_hop_and_is_gone_with_the_session(open_swarm):
    own, other = lora(1), lora(2)
    async with open_swarm() as swarm:
        hosts = await serve(swarm, client_adapters=LIMIT)
        client, stranger = await swarm.client(), await swarm.client()
        session = await client.session(BLOCKS, own_adapter=own)
        beside = await stranger.session(BLOCKS, own_adapter=other)
        plain = await stranger.session(BLOCKS)
        row = tokens(8)
        for start in (0, 4):
            for who, weights in ((session, own), (beside, other), (plain, None)):
                result = await who.step(row[start : start + 4], want="all")
                assert torch.equal(result, expected(row, weights)[start : start + 4])
        for host in hosts:
            assert len(host.task.engine.adapters) == 2
            # 3 blocks of two matrices of 2 x 8 values of four bytes, for each of two sessions.
            assert host.server.spans[0].adapter_room.held_bytes == 2 * 3 * 2 * 16 * 4
            assert host.task.adapters == frozenset()
        session.close()
        beside.close()
        await trio.sleep(1)
        for host in hosts:
            assert host.task.engine.adapters == frozenset()
            assert host.server.spans[0].adapter_room.held_bytes == 0


async def test_only_hops_whose_blocks_it_changes_are_sent_it(open_swarm):
    own = lora(1, Span(4, 5))
    async with open_swarm() as swarm:
        # A peer that has no block of the adapter need not accept adapters at all.
        first, middle, last = (
            await serve(swarm, spans=[(0, 3)])
            + await serve(swarm, spans=[(3, 6)], client_adapters=LIMIT)
            + await serve(swarm, spans=[(6, 9)])
        )
        session = await (await swarm.client()).session(BLOCKS, own_adapter=own)
        row = tokens(5)
        assert torch.equal(await session.step(row), expected(row, own)[4:])
        assert [len(host.task.engine.adapters) for host in (first, middle, last)] == [0, 1, 0]


@pytest.mark.parametrize("dies", [0, 1, 2])
async def test_a_replacement_is_sent_the_clients_adapter_before_its_first_step(open_swarm, dies):
    own = lora(3)
    async with open_swarm() as swarm:
        hosts = await serve(swarm, client_adapters=LIMIT)
        session = await (await swarm.client()).session(BLOCKS, own_adapter=own)
        row = tokens(12)
        await session.step(row[:5])
        (spare,) = await serve(swarm, spans=[(3 * dies, 3 * dies + 3)], client_adapters=LIMIT)
        swarm.kill(hosts[dies])
        for position in range(5, 12):
            result = await session.step(row[position : position + 1])
            assert torch.equal(result, expected(row, own)[position : position + 1])
        assert session.failovers == 1
        assert len(spare.task.engine.adapters) == 1


async def test_servers_that_would_not_take_it_are_not_asked(open_swarm):
    own = lora(1)
    async with open_swarm() as swarm:
        refusing = await serve(swarm)
        small = await serve(swarm, client_adapters=100)
        client = await swarm.client()
        session = await client.session(BLOCKS, own_adapter=own)
        with pytest.raises(NoChain, match="serves blocks 0:9 with room for the client's own adapter"):
            await session.open()
        assert client.finder.failures == []
        ready = await serve(swarm, client_adapters=LIMIT)
        assert torch.equal(await session.step(tokens(3)), expected(tokens(3), own)[2:])
        assert not any(host.task.engine.adapters for host in refusing + small)
        assert all(host.task.engine.adapters for host in ready)


async def test_an_adapter_that_does_not_fit_the_model_is_told_to_the_caller(open_swarm):
    wrong = {(4, "no such layer"): next(iter(lora(1).values()))}
    async with open_swarm() as swarm:
        hosts = await serve(swarm, client_adapters=LIMIT)
        session = await (await swarm.client()).session(BLOCKS, own_adapter=wrong)
        with pytest.raises(InvalidRequest, match="block 4 has no linear layer no such layer"):
            await session.open()
        await trio.sleep(1)
        assert all(host.server.spans[0].adapter_room.held_bytes == 0 for host in hosts)
        assert all(host.server.sessions == 0 for host in hosts)


# Forged uploads.


def upload(**fields):
    return Upload(**{"session": b"s" * 16, "hop": 0, "pairs": 1, "values": 32} | fields)


def prompt(values=None, **fields):
    header, body = encode_tensor(torch.ones(2, WIDTH) if values is None else values)
    return Prompt(**{"block": 0, "tensor": header.to_fields()} | fields).to_header(), body


def matrix_a(values=None, **fields):
    header, body = encode_tensor(torch.ones(2, WIDTH) if values is None else values)
    said = {"block": 0, "module": FAKE_LAYER, "scale": 1.0, "tensor": header.to_fields()} | fields
    return MatrixA(**said).to_header(), body


def matrix_b():
    header, body = encode_tensor(torch.ones(WIDTH, 2))
    return MatrixB(tensor=header.to_fields()).to_header(), body


async def heard(stream):
    return parse((await stream.receive()).header, (Granted, Loaded, Failure))


async def say_all(caller, host, first, *messages):
    """What comes of an upload, message by message: the last answer, or the error that the stream ended with."""
    stream = await caller.stream(host, ADAPTER_PROTOCOL)
    try:
        await stream.send(first.to_header())
        said = await heard(stream)
        if isinstance(said, Granted):
            for header, body in messages:
                await stream.send(header, body)
            stream.finish()
            said = await heard(stream)
    except PeerFault as error:
        return error
    return said.error if isinstance(said, Failure) else said


async def own_session(caller, host, **fields):
    return await caller.open(host, needs=(OWN_ADAPTER,), **fields)


async def test_deep_prompts_reach_the_hops_of_their_blocks_and_those_that_replace_them(open_swarm):
    prompts = {(block, PROMPT): DeepPrompt(tokens(2, block)) for block in (1, 4, 8)}
    async with open_swarm() as swarm:
        hosts = await serve(swarm, client_adapters=LIMIT)
        spare = (await serve(swarm, spans=[(3, 6)], client_adapters=LIMIT))[0]
        session = await (await swarm.client()).session(BLOCKS, own_adapter=lora(1) | prompts)
        row = tokens(9)
        assert torch.equal(await session.step(row[:5]), expected(row, lora(1) | prompts)[4:5])
        used = next(host for host in (hosts[1], spare) if session.chain[1].peer == host.peer_id)
        swarm.kill(used)
        assert torch.equal(await session.step(row[5:9]), expected(row, lora(1) | prompts)[8:9])


async def test_prefixes_reach_the_hops_of_their_blocks(open_swarm):
    prefixes = {(block, name): DeepPrompt(tokens(2, block)) for block in (1, 8) for name in (PREFIX_K, PREFIX_V)}
    async with open_swarm() as swarm:
        await serve(swarm, client_adapters=LIMIT)
        session = await (await swarm.client()).session(BLOCKS, own_adapter=prefixes)
        row = tokens(5)
        assert torch.equal(await session.step(row), expected(row, prefixes)[4:5])
        assert not torch.equal(expected(row, prefixes), expected(row, {}))


async def test_an_upload_that_breaks_a_rule_is_refused_and_leaves_nothing(open_swarm):
    async with open_swarm() as swarm:
        (host,) = await serve(swarm, spans=[(0, 3)], client_adapters=LIMIT)
        caller, thief = await swarm.caller(), await swarm.caller()
        await own_session(caller, host)
        room = host.server.spans[0].adapter_room
        wide = torch.ones(2, WIDTH + 1)
        huge = {"shape": [2, 2**30], "dtype": "float32", "codec": "exact"}
        infinite = (matrix_a()[0], [memoryview(torch.full((2, WIDTH), torch.inf).numpy()).cast("B")])
        cases = [
            (UnsupportedFeature, upload(values=LIMIT)),
            (InvalidRequest, upload(session=b"t" * 16)),
            (InvalidRequest, upload(hop=1)),
            (InvalidRequest, upload(pairs=3 * 64 + 1)),
            (RemoteProtocolError, upload(), matrix_b()),
            (RemoteProtocolError, upload(), matrix_a()),
            (RemoteProtocolError, upload(), matrix_a(), matrix_a()),
            (RemoteProtocolError, upload(), infinite, matrix_b()),
            (StreamReset, upload(values=31), matrix_a(), matrix_b()),
            (
                RemoteProtocolError,
                upload(),
                matrix_a(tensor=huge),
            ),
            (InvalidRequest, upload(values=34), matrix_a(wide), matrix_b()),
            (InvalidRequest, upload(), matrix_a(torch.ones(1, WIDTH)), matrix_b()),
            (InvalidRequest, upload(), matrix_a(torch.ones(16)), matrix_b()),
            (InvalidRequest, upload(), matrix_a(block=3), matrix_b()),
            (InvalidRequest, upload(), matrix_a(module="other"), matrix_b()),
            (InvalidRequest, upload(pairs=2, values=64), matrix_a(), matrix_b(), matrix_a(), matrix_b()),
            (InvalidRequest, upload(prompts=10)),
            (RemoteProtocolError, upload(values=64, prompts=1), matrix_a(), matrix_b(), matrix_a()),
            (InvalidRequest, upload(values=64, prompts=1), matrix_a(), matrix_b(), prompt(block=3)),
            (InvalidRequest, upload(values=64, prompts=2), matrix_a(), matrix_b(), prompt(), prompt()),
            (InvalidRequest, upload(values=64, prompts=1), matrix_a(), matrix_b(), prompt(wide)),
            (InvalidRequest, upload(values=64, prompts=1), matrix_a(), matrix_b(), prompt(wide, name="prefix_k")),
            (
                InvalidRequest,
                upload(values=96, prompts=2),
                matrix_a(),
                matrix_b(),
                prompt(name="prefix_v"),
                prompt(name="prefix_v"),
            ),
            (StreamReset, upload(values=33, prompts=1), matrix_a(), matrix_b(), prompt()),
        ]
        for error, first, *messages in cases:
            said = await say_all(caller, host, first, *messages)
            assert isinstance(said, error), (first, said)
            assert room.held_bytes == 0
        # A session can be given an adapter only by its own client.
        assert isinstance(await say_all(thief, host, upload(), matrix_a(), matrix_b()), InvalidRequest)
        await trio.sleep(1)
        assert host.task.engine.adapters == frozenset()
        # After all that the session still takes the right one, once.
        assert isinstance(await say_all(caller, host, upload(), matrix_a(), matrix_b()), Loaded)
        assert isinstance(await say_all(caller, host, upload(), matrix_a(), matrix_b()), InvalidRequest)
        assert len(host.task.engine.adapters) == 1


async def test_a_session_that_asked_for_none_takes_none(open_swarm):
    async with open_swarm() as swarm:
        (host,) = await serve(swarm, spans=[(0, 3)], client_adapters=LIMIT)
        caller = await swarm.caller()
        await caller.open(host)
        assert isinstance(await say_all(caller, host, upload(), matrix_a(), matrix_b()), InvalidRequest)
        refused = await caller.refused(host, session=b"u" * 16, needs=(OWN_ADAPTER,), adapter=POET)
        assert isinstance(refused, InvalidRequest)


async def test_steps_wait_for_the_adapter_that_the_session_needs(open_swarm):
    async with open_swarm() as swarm:
        (host,) = await serve(swarm, spans=[(0, 3)], client_adapters=LIMIT)
        caller = await swarm.caller()
        stream = await own_session(caller, host)
        header, body = encode_tensor(tokens(2))
        step = Step(epoch=0, seq=1, rows=(RowSlice(0, 0, 2),), tensor=header.to_fields(), want="all")
        said = await caller.ask(stream, step, body)
        assert isinstance(said, Failure)
        assert isinstance(said.error, InvalidRequest)
        assert said.seq == 1
        assert isinstance(await say_all(caller, host, upload(), matrix_a(), matrix_b()), Loaded)
        assert not isinstance(await caller.ask(stream, step, body), Failure)


async def test_a_session_that_ends_during_its_upload_leaves_nothing(open_swarm):
    async with open_swarm() as swarm:
        (host,) = await serve(swarm, spans=[(0, 3)], client_adapters=LIMIT)
        caller = await swarm.caller()
        control = await own_session(caller, host)
        stream = await caller.stream(host, ADAPTER_PROTOCOL)
        await stream.send(upload().to_header())
        assert isinstance(await heard(stream), Granted)
        await stream.send(*matrix_a())
        control.reset("closed")
        await trio.sleep(1)
        await stream.send(*matrix_b())
        said = await heard(stream)
        assert isinstance(said, Failure)
        assert isinstance(said.error, Evicted)
        await trio.sleep(1)
        assert host.task.engine.adapters == frozenset()
        assert host.server.spans[0].adapter_room.held_bytes == 0


async def test_a_client_that_stalls_an_upload_is_given_up(open_swarm):
    async with open_swarm() as swarm:
        (host,) = await serve(swarm, spans=[(0, 3)], client_adapters=LIMIT)
        caller = await swarm.caller()
        await own_session(caller, host)
        stream = await caller.stream(host, ADAPTER_PROTOCOL)
        await stream.send(upload().to_header())
        assert isinstance(await heard(stream), Granted)
        said = await heard(stream)
        assert isinstance(said, Failure)
        assert isinstance(said.error, Overloaded)
        assert host.server.spans[0].adapter_room.held_bytes == 0


async def test_a_hop_that_grants_and_falls_silent_does_not_hold_its_client_for_ever(open_swarm):
    async with open_swarm() as swarm:
        (host,) = await serve(swarm, spans=[(0, 3)], client_adapters=LIMIT)
        client = await swarm.client()
        chain = await client.finder.find(Span(0, 3), tokens=0, exclude=())
        with pytest.raises(InvalidRequest, match="no such session"):
            await send_adapter(client.connections, chain.hops[0], b"s" * 16, 0, lora(1))
        swarm.freeze(host)
        with pytest.raises(PeerdError):
            await send_adapter(client.connections, chain.hops[0], b"s" * 16, 0, lora(1))


def test_room_is_shared_among_owners():
    room = AdapterRoom(100, value_bytes=2)
    with pytest.raises(UnsupportedFeature, match="takes 102 bytes here, a session may bring 100"):
        room.reserve(Owner(PeerId("a")), 51)
    assert [room.reserve(Owner(PeerId("a")), 50), room.reserve(Owner(PeerId("a")), 50)] == [100, 100]
    with pytest.raises(Overloaded):
        room.reserve(Owner(PeerId("a")), 1)
    room.reserve(Owner(PeerId("b")), 50)
    room.reserve(Owner(PeerId("c")), 50)
    with pytest.raises(Overloaded):
        room.reserve(Owner(PeerId("d")), 1)
    room.release(Owner(PeerId("a")), 100)
    room.reserve(Owner(PeerId("d"), "net"), 50)
    room.release(Owner(PeerId("b")), 100)
    room.release(Owner(PeerId("c")), 100)
    room.reserve(Owner(PeerId("e"), "net"), 50)
    with pytest.raises(Overloaded):
        # Another key brings its network no more.
        room.reserve(Owner(PeerId("f"), "net"), 1)
    room.reserve(Owner(PeerId("b")), 50)
    with pytest.raises(ValueError, match="x"), room.reserved(Owner(PeerId("c")), 0):
        raise ValueError("x")
    assert room.held_bytes == 400


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "upload", "?"]),
            st.dictionaries(
                st.sampled_from(["block", "module", "scale", "tensor", "shape"]),
                st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(0, 9), max_size=5),
                max_size=3,
            ),
            st.binary(max_size=80),
        ),
        max_size=4,
    )
)
def test_whatever_is_uploaded_is_taken_or_refused_with_a_reason(messages):
    from peerd.exchange.adapter_upload import receive_adapter
    from peerd.protocol.encoding.wire import RawMessage

    class Said:
        """A stream whose peer says just that."""

        def __init__(self):
            self.left = list(messages)

        async def send(self, header):
            await trio.lowlevel.checkpoint()

        async def receive(self, max_body):
            await trio.lowlevel.checkpoint()
            if not self.left:
                raise trio.EndOfChannel
            kind, fields, body = self.left.pop(0)
            tensor = {"shape": [2, 2], "dtype": "float16", "codec": "exact"} | {
                key: value for key, value in fields.items() if key == "shape"
            }
            header = {"type": kind, "block": 0, "module": "m", "scale": 1, "tensor": tensor} | fields
            return RawMessage(header, memoryview(body))

    async def receive():
        try:
            found = await receive_adapter(Said(), upload(pairs=2), Span(0, 2))
        except PeerdError:
            return
        assert len(found) == 2

    trio.run(receive)


def test_weights_in_memory_are_checked_before_they_travel():
    a, b = torch.ones(2, 8), torch.ones(8, 2)
    for pair in (
        LoraPair(a, b.T, 1.0),
        LoraPair(a[0], b, 1.0),
        LoraPair(a, b * torch.nan, 1.0),
        LoraPair(a, b, float("nan")),
        LoraPair(a.int(), b.int(), 1.0),
    ):
        with pytest.raises(AdapterError):
            LoraAdapter({(0, "layer"): pair})
    with pytest.raises(AdapterError):
        LoraAdapter({})
    kept = LoraAdapter({(0, "layer"): LoraPair(a.requires_grad_(), b, 2.0)}).weights[0, "layer"]
    assert not kept.a.requires_grad
