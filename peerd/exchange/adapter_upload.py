"""Uploads a client's own adapter to each hop of its chain, and receives it there.

Both ends of `/peerd/adapter/1` (spec/adapters.md) are here: `send_adapter` for the client, `receive_adapter` for the
hop. How much a hop accepts is decided in `peerd/server/quotas.py`. The adapter comes from a stranger whose session may
end at any moment, so the hop uses nothing of it before the last matrix has arrived.
"""

from __future__ import annotations

import torch
import trio

from peerd.compute.adapters.lora import BlockModule, Lora, LoraPair, within
from peerd.net.connections import Connections, Stream
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.encoding.tensors import TensorHeader, decode_tensor, encode_tensor
from peerd.protocol.errors import (
    ConnectionLost,
    InvalidRequest,
    Overloaded,
    PeerFault,
    RemoteProtocolError,
)
from peerd.protocol.messages.adapters import (
    ADAPTER_PROTOCOL,
    MAX_PAIRS_A_BLOCK,
    Granted,
    Loaded,
    MatrixA,
    MatrixB,
    Upload,
)
from peerd.protocol.messages.session import Failure
from peerd.protocol.span import Span
from peerd.routing.chains.chain import Hop
from peerd.trio_tools import open_tasks

# Long enough for 64 MB at 2 Mbit/s. A slower client would hold pages for which others wait.
UPLOAD_DEADLINE_S = 300.0
# The widest value on the wire.
_WIRE_VALUE_BYTES = 4


async def receive_adapter(stream: Stream, upload: Upload, blocks: Span) -> dict[BlockModule, LoraPair]:
    """Grant an upload and receive its pairs, all of them for `blocks`. Raises InvalidRequest or a PeerFault."""
    if upload.pairs > MAX_PAIRS_A_BLOCK * len(blocks):
        raise InvalidRequest(f"{upload.pairs} pairs for blocks {blocks}: at most {MAX_PAIRS_A_BLOCK} for each block")
    await stream.send(Granted().to_header())
    found: dict[BlockModule, LoraPair] = {}
    left = upload.values
    try:
        for _ in range(upload.pairs):
            raw = await stream.receive(max_body=left * _WIRE_VALUE_BYTES)
            first = parse(raw.header, (MatrixA,))
            a = _matrix(first.tensor, raw.body, left)
            left -= a.numel()
            raw = await stream.receive(max_body=left * _WIRE_VALUE_BYTES)
            b = _matrix(parse(raw.header, (MatrixB,)).tensor, raw.body, left)
            left -= b.numel()
            key = (first.block, first.module)
            if not blocks.start <= first.block < blocks.end or key in found or a.shape[0] != b.shape[1]:
                raise InvalidRequest(
                    f"matrices {list(b.shape)} x {list(a.shape)} for {first.module} of block {first.block}: the session"
                    f" runs blocks {blocks}, each layer comes once, and both matrices have one rank"
                )
            found[key] = LoraPair(a, b, first.scale)
    except trio.EndOfChannel:
        raise RemoteProtocolError(f"an upload of {upload.pairs} pairs ended after {len(found)}") from None
    return found


def _matrix(fields: dict[str, object], body: memoryview, max_values: int) -> torch.Tensor:
    header = TensorHeader.from_fields(fields, max_elements=max_values)
    if len(header.shape) != 2:
        raise InvalidRequest(f"a matrix has two sides, not the shape {list(header.shape)}")
    return decode_tensor(header, body)


async def send_adapter(connections: Connections, hop: Hop, session: bytes, number: int, lora: Lora) -> None:
    """Upload the part of `lora` that belongs to a hop. The session must be open there, as hop number `number`.

    Raises the error with which the hop refuses, or a PeerFault.
    """
    own = within(lora, hop.span)
    values = sum(pair.a.numel() + pair.b.numel() for pair in own.values())
    upload = Upload(session=session, hop=number, pairs=len(own), values=values)
    stream = await connections.open_stream(
        hop.peer_id, ADAPTER_PROTOCOL, addresses=hop.offer.addresses, priority=Priority.BULK
    )
    async with stream:
        try:
            with trio.fail_after(UPLOAD_DEADLINE_S):
                await stream.send(upload.to_header())
                await _expect(stream, Granted)
                async with open_tasks() as tasks:
                    tasks.start_soon(_send_pairs, stream, own)
                    # The hop may refuse at any time, so we listen while we send.
                    await _expect(stream, Loaded)
                    tasks.cancel_scope.cancel()
        except trio.EndOfChannel:
            raise ConnectionLost(f"{hop.peer_id} ended the upload") from None
        except trio.TooSlowError:
            raise Overloaded(f"the adapter did not reach {hop.peer_id} within {UPLOAD_DEADLINE_S:g} s") from None


async def _expect(stream: Stream, wanted: type[Message]) -> None:
    said = parse((await stream.receive()).header, (wanted, Failure))
    if isinstance(said, Failure):
        raise said.error


async def _send_pairs(stream: Stream, own: Lora) -> None:
    for (block, module), pair in own.items():
        header, a = encode_tensor(pair.a)
        first = MatrixA(block=block, module=module, scale=pair.scale, tensor=header.to_fields())
        header, b = encode_tensor(pair.b)
        try:
            await stream.send(first.to_header(), a)
            await stream.send(MatrixB(tensor=header.to_fields()).to_header(), b)
        except (PeerFault, trio.ClosedResourceError):
            # The task that listens on the stream gets the reason.
            return
