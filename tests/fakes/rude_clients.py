"""What tests say to a server on a control stream, and what they hear."""

import torch
import trio

from peerd.exchange.step_tensors import encoded
from peerd.protocol.encoding.tensors import TensorHeader, decode_tensor
from peerd.protocol.errors import (
    StreamReset,
)
from peerd.protocol.messages.session import (
    Failure,
    Output,
    Step,
)
from peerd.protocol.rows import RowSlice
from peerd.testing.fake_engine import fake_forward

WIDTH = 8

MODEL = bytes(range(32))


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 251, (count, WIDTH), generator=generator).float()


def step(hidden, seq=1, start=0, *, epoch=0, rows=None, **fields):
    """A step's header and body, by default of row 0 from `start`."""
    if rows is None:
        rows = (RowSlice(0, start, len(hidden)),) if len(hidden) else ()
    message = Step(epoch=epoch, seq=seq, rows=tuple(rows), **fields)
    return encoded(message, hidden, "exact", torch.float32)


async def send(stream, hidden, *args, **fields):
    await stream.send(*step(hidden, *args, **fields))


async def answer(caller, stream, hidden, *args, **fields):
    """The error, gap or tensor that a step is answered with."""
    await send(stream, hidden, *args, **fields)
    return await next_answer(stream)


async def next_answer(stream):
    raw = await stream.receive(max_body=2**22)
    if raw.header["type"] == Failure.TYPE:
        return Failure.from_header(raw.header).error
    if raw.header["type"] != Output.TYPE:
        return raw.header
    output = Output.from_header(raw.header)
    if output.tensor is None:
        return None
    return decode_tensor(TensorHeader.from_fields(output.tensor, max_elements=2**20), raw.body)


async def is_ended(stream):
    """Whether the hop ends a stream on which nothing more comes."""
    with trio.move_on_after(30):
        try:
            while True:
                await stream.receive(max_body=2**22)
        except (trio.EndOfChannel, StreamReset):
            return True
    return False


async def is_cut_short(stream, messages):
    """Whether the hop ends the stream before all of these are sent."""
    try:
        for header, body in messages:
            await stream.send(header, body)
            await trio.sleep(0.01)
    except (StreamReset, trio.ClosedResourceError):
        return True
    return False


async def serves_well(swarm, host, seed=99):
    """Whether another client still gets exact answers."""
    client = await swarm.client()
    session = await client.session(host.span, max_length=64)
    row = tokens(6, seed)
    results = torch.cat([await session.step(row[i : i + 1]) for i in range(6)])
    session.close()
    return torch.equal(results, fake_forward(row, host.span))
