"""What strangers may do on a lane: nothing that costs other clients their memory or their turn."""

from __future__ import annotations

import random

import pytest
import torch
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peerd.client.training.pass_maker import PassMaker
from peerd.client.training.trained import Trained
from peerd.compute.adapters.lora import MAX_RANK
from peerd.net.limits.owners import Owner
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import parse
from peerd.protocol.encoding.tensors import encode_tensor
from peerd.protocol.errors import Overloaded, StreamReset
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.training import (
    PASS_FROM_HOP,
    PASS_PROTOCOL,
    Backward,
    Begin,
    Begun,
    Forward,
    Parameter,
    Part,
    PassFailure,
    Result,
)
from peerd.protocol.span import Span
from peerd.server.quotas import HOST_BYTES, HostQuota
from peerd.server.training.lane import PARAMETER_BYTES
from peerd.server.training.lanes import MAX_LANES_A_PEER

MODEL = bytes(range(32))
BLOCKS = Span(0, 3)
WIDTH = 32
Q_PROJ_A = "self_attn.q_proj.lora_A"


def begin(**fields):
    return Begin(**{"model": MODEL, "start": 0, "end": 3} | fields)


def part(rows, width=WIDTH, dtype=torch.float32):
    header, body = encode_tensor(torch.ones(rows, width), dtype=dtype)
    return Part(header.to_fields()), body


async def say(stream, *messages):
    """Messages alone, or each with its body."""
    for message in messages:
        message, body = message if isinstance(message, tuple) else (message, ())
        await stream.send(message.to_header(), body)


async def hear(stream):
    """What comes next, with the parts that belong to nothing left out."""
    while True:
        with trio.fail_after(60):
            raw = await stream.receive(max_body=2**21)
        message = parse(raw.header, PASS_FROM_HOP)
        if not isinstance(message, Part):
            return message


async def lane(caller, host, **fields):
    stream = await caller.stream(host, PASS_PROTOCOL)
    await say(stream, begin(**fields))
    return stream


async def refused(stream):
    """The code with which the lane ends, or its stream does."""
    try:
        while not isinstance(said := await hear(stream), PassFailure):
            pass
    except StreamReset as reset:
        return reset.reason
    return said.code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": bytes(32)}, "not_served"),
        ({"end": 4}, "not_served"),
        ({"start": 2, "end": 2}, "not_served"),
        ({"codec": "zip"}, "unsupported"),
        ({"adapter": "poet"}, "unsupported"),
        ({"adapter": "~private"}, "unsupported"),
        ({"needs": ("lora", "magic")}, "unsupported"),
        ({"values": HOST_BYTES}, "no_room"),
    ],
)
async def test_a_lane_that_cannot_be_is_refused(open_swarm, serve_tiny, fields, code):
    async with open_swarm() as swarm:
        host = await serve_tiny(swarm, BLOCKS)
        stream = await lane(await swarm.caller(), host, **fields)
        assert await refused(stream) == code
        await trio.sleep(1)
        assert host.server.passes.lanes == host.server.passes.held_bytes == 0


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([part(1)], "protocol"),
        ([begin()], "protocol"),
        ([Forward(1, (2,)), part(3)], "protocol"),
        ([Forward(1, (2,)), part(2, WIDTH + 1)], "protocol"),
        ([Forward(1, (2,)), part(1), part(1, dtype=torch.bfloat16)], "protocol"),
        ([Forward(1, (2,)), Forward(2, (2,))], "protocol"),
        ([Forward(1, (2,)), (part(2)[0], [b"short"])], "protocol"),
        ([Backward(1, (2,), 7), part(2)], "protocol"),
        ([Forward(1, (2,), keep=True), part(2), Backward(2, (1, 1), 1), part(2)], "protocol"),
        (
            [Forward(1, (2,), keep=True), part(2), Backward(2, (2,), 1), part(2), Backward(3, (2,), 1), part(2)],
            "protocol",
        ),
        ([Forward(1, (1,)), part(1), Forward(2, (1,)), part(1), Forward(3, (1,))], "protocol"),
        ([Forward(1, ())], "invalid"),
        ([Forward(1, (1000,) * 5)], "invalid"),
        ([Forward(1, (100_000,))], "context_too_long"),
    ],
)
async def test_what_is_out_of_turn_or_does_not_fit_ends_the_lane(open_swarm, serve_tiny, messages, code):
    async with open_swarm() as swarm:
        host = await serve_tiny(swarm, BLOCKS, step_s=1.0)
        stream = await lane(await swarm.caller(), host)
        assert isinstance(await hear(stream), Begun)
        await say(stream, *messages)
        assert await refused(stream) == code
        await trio.sleep(10)
        assert host.server.passes.lanes == host.server.passes.held_bytes == 0


@pytest.mark.parametrize(
    "messages",
    [
        [Parameter(0, "prompt", (1, 2, WIDTH)), part(3)],
        [Parameter(0, "prompt", (1, 4, WIDTH))],
        [Parameter(0, "prompt", (2 * WIDTH,))],
        [Forward(1, (2,))],
    ],
)
async def test_parameters_that_were_not_announced_are_refused(open_swarm, serve_tiny, messages):
    async with open_swarm() as swarm:
        host = await serve_tiny(swarm, BLOCKS)
        stream = await lane(await swarm.caller(), host, parameters=1, values=2 * WIDTH)
        await say(stream, *messages)
        assert await refused(stream) == "protocol"


async def test_parameters_that_fit_no_module_are_the_callers_fault(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        host = await serve_tiny(swarm, BLOCKS)
        stream = await lane(await swarm.caller(), host, parameters=1, values=2 * WIDTH)
        await say(stream, Parameter(0, "nonsense", (2, WIDTH)))
        # Before their values come.
        assert await refused(stream) == "invalid"


@pytest.mark.parametrize(
    "parameters",
    [
        [Parameter(0, Q_PROJ_A, (2, WIDTH + 1))],
        [Parameter(3, Q_PROJ_A, (2, WIDTH))],
        [Parameter(0, Q_PROJ_A, (MAX_RANK + 1, WIDTH))],
        [
            Parameter(0, "self_attn.q_proj.lora_A", (1, WIDTH)),
            part(1),
            Parameter(0, "self_attn.q_proj.lora_A", (1, WIDTH)),
        ],
    ],
    ids=["too wide", "another block", "a rank that others would wait for", "twice"],
)
async def test_a_parameter_that_no_pass_could_use_is_refused_before_its_values_come(open_swarm, serve_tiny, parameters):
    async with open_swarm() as swarm:
        host = await serve_tiny(swarm, BLOCKS)
        stream = await lane(await swarm.caller(), host, parameters=8, values=10**6)
        await say(stream, *parameters)
        assert await refused(stream) == "invalid"


async def test_more_parameters_than_the_blocks_have_are_refused_at_once_and_each_is_counted(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        host = await serve_tiny(swarm, BLOCKS)
        caller = await swarm.caller()
        assert await refused(await lane(caller, host, parameters=2**16, values=2**17)) == "invalid"
        stream = await lane(caller, host, parameters=40, values=40)
        await trio.sleep(0.1)
        assert host.server.passes.held_bytes >= 40 * PARAMETER_BYTES
        stream.reset("closed")


def test_a_network_holds_at_most_half_of_the_host_memory_whatever_keys_it_has():
    quota = HostQuota(1000)
    one, two, other = Owner(PeerId("1"), "net"), Owner(PeerId("2"), "net"), Owner(PeerId("3"), "other")
    quota.take(one, 400)
    with pytest.raises(Overloaded):
        quota.take(two, 200)
    quota.take(other, 500)
    quota.give(one, 400)
    quota.take(two, 200)
    assert quota.held_bytes == 700


async def test_a_request_that_is_only_claimed_is_no_longer_reserved_when_its_peer_is_gone(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        host = await serve_tiny(swarm, BLOCKS)
        caller = await swarm.caller()
        stream = await lane(caller, host)
        assert isinstance(await hear(stream), Begun)
        await say(stream, Forward(1, (500,)))
        await trio.sleep(1)
        assert host.server.passes.held_bytes == 3 * 500 * WIDTH * 4
        stream.reset("cancelled")
        await trio.sleep(1)
        assert host.server.passes.held_bytes == 0


async def test_one_peer_has_a_bounded_number_of_lanes_and_others_have_theirs(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        host = await serve_tiny(swarm, BLOCKS)
        caller, other = await swarm.caller(), await swarm.caller()
        streams = [await lane(caller, host) for _ in range(MAX_LANES_A_PEER)]
        for stream in streams:
            assert isinstance(await hear(stream), Begun)
        assert await refused(await lane(caller, host)) == "overloaded"
        assert isinstance(await hear(await lane(other, host)), Begun)
        streams[0].reset("closed")
        await trio.sleep(1)
        assert isinstance(await hear(await lane(caller, host)), Begun)


async def test_one_peer_holds_at_most_half_of_the_host_memory(open_swarm, serve_tiny, monkeypatch):
    monkeypatch.setattr("peerd.server.training.lanes.HOST_BYTES", 2 * 3 * 10 * WIDTH * 4)
    async with open_swarm() as swarm:
        host = await serve_tiny(swarm, BLOCKS, step_s=5.0)
        greedy, modest = await swarm.caller(), await swarm.caller()
        first, second, third = [await lane(who, host) for who in (greedy, greedy, modest)]
        for stream in (first, second, third):
            assert isinstance(await hear(stream), Begun)
        await say(first, Forward(1, (10,)), part(10))
        await say(second, Forward(1, (1,)), part(1))
        assert await refused(second) == "overloaded"
        await say(third, Forward(1, (10,)), part(10))
        assert isinstance(await hear(third), Result)
        fourth = await lane(modest, host)
        assert isinstance(await hear(fourth), Begun)
        await say(fourth, Forward(1, (11,)))
        assert await refused(fourth) == "no_room"


async def test_a_draining_peer_takes_no_new_lanes(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        host = await serve_tiny(swarm, BLOCKS)
        host.server.draining = True
        assert await refused(await lane(await swarm.caller(), host)) == "draining"


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5000) | st.text(max_size=8) | st.binary(max_size=32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_rows = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
_seqs = st.integers(1, 3)
_anything = st.one_of(
    st.builds(lambda seq, rows, keep: Forward(seq, rows, keep).to_header(), _seqs, _rows, st.booleans()),
    st.builds(lambda seq, rows, of: Backward(seq, rows, of).to_header(), _seqs, _rows, st.none() | _seqs),
    st.builds(lambda rows: part(rows)[0].to_header(), st.integers(1, 4)),
    st.dictionaries(st.sampled_from(["type", "seq", "rows", "of", "tensor", "keep", "shape"]), _values),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(_anything, max_size=8), bodies=st.randoms(use_true_random=False))
def test_whatever_is_said_on_a_lane_the_next_client_is_served(open_swarm, serve_tiny, messages, bodies):
    async def check():
        async with open_swarm() as swarm:
            host = await serve_tiny(swarm, BLOCKS)
            caller = await swarm.caller()
            stream = await lane(caller, host)
            for header in messages:
                body = part(bodies.choice([1, 2, 4]))[1] if header.get("type") == "part" else ()
                try:
                    await stream.send(header, body, priority=Priority.BULK)
                except (trio.ClosedResourceError, StreamReset):
                    break
            await trio.sleep(5)
            stream.reset("closed")
            await trio.sleep(1)
            assert host.server.passes.lanes == host.server.passes.held_bytes == 0
            client = caller.client
            maker = PassMaker(client.finder, client.connections, MODEL, WIDTH, "float32", random.Random(1))
            await maker.forward(torch.ones(4, WIDTH), (4,), BLOCKS, Trained(), keep=False)

    trio.run(check, clock=trio.testing.MockClock(autojump_threshold=0))
