"""A hop tells its client sketches of what came to it, and sends its rows to one more hop when it is asked to."""

from __future__ import annotations

import pytest
import torch
import trio

from peerd.compute.audits.sketches import Sketcher, are_same
from peerd.exchange.sketch_log import SketchLog
from peerd.exchange.step_tensors import encoded
from peerd.protocol.messages.audits import Copy, Sketch
from peerd.protocol.messages.session import Failure, Output, Step
from peerd.protocol.rows import RowSlice
from peerd.protocol.span import Span
from peerd.server.sessions.hosted_session import MAX_COPIES
from peerd.server.sessions.sketching import POSITIONS_A_MESSAGE
from peerd.testing.fake_engine import fake_forward
from tests.peerd.conftest import WIDTH

SEED, OTHER = b"a" * 16, b"b" * 16
BOTH = (SEED, OTHER)


def tokens(count):
    return torch.randint(0, 251, (count, WIDTH), generator=torch.Generator().manual_seed(0)).float()


def sketch(seed, hidden):
    return Sketcher((seed,), WIDTH).sketch(hidden)


async def send(stream, seq, start, hidden):
    step = Step(epoch=0, seq=seq, rows=(RowSlice(0, start, len(hidden)),))
    await stream.send(*encoded(step, hidden, "exact", torch.float32))


async def hear(stream, log):
    """Take the hop's next message, and return its type."""
    raw = await stream.receive(max_body=2**22)
    if raw.header["type"] == Sketch.TYPE:
        log.take(Sketch.from_header(raw.header), raw.body)
    return raw.header["type"]


async def test_every_position_is_sketched_and_those_of_tokens_are_told_together(open_swarm):
    async with open_swarm() as swarm:
        caller, host = await swarm.caller(), await swarm.serve(0, 4)
        stream, log = await caller.open(host, sketch=(SEED,)), SketchLog((SEED,))
        hidden = tokens(20 + POSITIONS_A_MESSAGE)
        await send(stream, 1, 0, hidden[:20])
        kinds = [await hear(stream, log) for _ in range(2)]
        for number in range(20, len(hidden)):
            await send(stream, number, number, hidden[number][None])
            while (kind := await hear(stream, log)) == Sketch.TYPE:
                kinds.append(kind)
        assert kinds == [Sketch.TYPE, Output.TYPE, Sketch.TYPE]
        assert are_same(log.inputs, sketch(SEED, hidden))


async def test_a_cut_row_is_told_at_once(open_swarm):
    async with open_swarm() as swarm:
        caller, host = await swarm.caller(), await swarm.serve(0, 4)
        stream, log = await caller.open(host, sketch=(SEED,), max_rollback=8), SketchLog((SEED,))
        hidden = tokens(20)
        for seq, start, part in ((1, 0, hidden[:16]), (2, 12, hidden[16:])):
            await send(stream, seq, start, part)
            assert {await hear(stream, log), await hear(stream, log)} == {Sketch.TYPE, Output.TYPE}
        assert are_same(log.inputs, sketch(SEED, torch.cat([hidden[:12], hidden[16:]])))


async def test_a_client_that_asks_for_none_is_told_none(open_swarm):
    async with open_swarm() as swarm:
        caller, host = await swarm.caller(), await swarm.serve(0, 4)
        stream = await caller.open(host)
        await send(stream, 1, 0, tokens(40))
        assert await hear(stream, SketchLog(())) == Output.TYPE
        with trio.move_on_after(60) as waited:
            await stream.receive(max_body=2**22)
        assert waited.cancelled_caught


async def chain_of_two(swarm, caller):
    """A session over two hops which has had some steps; its first hop, and that hop's control stream."""
    first, second = await swarm.serve(0, 4), await swarm.serve(4, 8)
    last = await caller.open(second, hop=1, sketch=(SEED,))
    stream = await caller.open(first, next=caller.next_hop(first, second))
    hidden = tokens(26)
    await send(stream, 1, 0, hidden[:20])
    for seq, start in enumerate(range(20, 26, 2), 2):
        await send(stream, seq, start, hidden[start : start + 2])
    return first, stream, last, hidden


async def test_a_hop_sends_its_rows_to_a_hop_that_checks_the_next_one(open_swarm):
    async with open_swarm() as swarm:
        caller = await swarm.caller()
        first, stream, last, hidden = await chain_of_two(swarm, caller)
        other, log = await swarm.serve(4, 8), SketchLog(BOTH)
        check = await caller.open(other, hop=2, sketch=BOTH)
        await trio.sleep(5)
        await stream.send(Copy(epoch=0, next=caller.next_hop(first, other, hop=2)).to_header())
        while len(log.outputs) < len(hidden):
            await hear(check, log)
        between = fake_forward(hidden, Span(0, 4))
        assert are_same(log.inputs[:, :16], sketch(SEED, between))
        assert are_same(log.inputs[:, 16:], sketch(OTHER, between))
        assert are_same(log.outputs, sketch(OTHER, fake_forward(hidden, Span(0, 8))))
        # The session goes on where it was.
        answers = 4
        await send(stream, 9, 26, tokens(1))
        while answers >= 0:
            answers -= await hear(last, SketchLog((SEED,))) == Output.TYPE


async def test_a_copy_that_cannot_be_sent_changes_nothing(open_swarm):
    async with open_swarm() as swarm:
        caller = await swarm.caller()
        first, stream, last, _ = await chain_of_two(swarm, caller)
        gone = await swarm.serve(4, 8)
        next_hop = caller.next_hop(first, gone, hop=2)
        swarm.kill(gone)
        await stream.send(Copy(epoch=0, next=next_hop).to_header())
        await trio.sleep(60)
        await send(stream, 9, 26, tokens(1))
        answers = 5
        while answers:
            answers -= await hear(last, SketchLog((SEED,))) == Output.TYPE


@pytest.mark.parametrize(("is_last", "code"), [(True, "invalid"), (False, "protocol")])
async def test_a_session_ends_that_asks_a_last_hop_for_a_copy_or_for_too_many(open_swarm, is_last, code):
    async with open_swarm() as swarm:
        caller = await swarm.caller()
        first, stream, last, _ = await chain_of_two(swarm, caller)
        asked = last if is_last else stream
        copy = Copy(epoch=0, next=caller.next_hop(first, first, hop=2))
        for _ in range(1 if is_last else MAX_COPIES + 1):
            await asked.send(copy.to_header())
        while (raw := await asked.receive(max_body=2**22)).header["type"] != Failure.TYPE:
            pass
        assert raw.header["code"] == code
