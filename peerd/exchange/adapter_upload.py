"""Uploads a client's own adapter to each hop of its chain, and receives it there.

Both ends of `/peerd/adapter/1` (spec/sessions/adapters.md) are here: `send_adapter` for the client, `receive_adapter`
for the hop. How much a hop accepts is decided in `peerd/server/quotas.py`. The adapter comes from a stranger whose
session may end at any moment, so the hop uses nothing of it before the last matrix has arrived.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import trio

from peerd.compute.adapters.lora import PROMPT, BlockModule, DeepPrompt, Lora, LoraPair, within
from peerd.net.connections import Connections, Stream
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.encoding.tensors import MAX_EXACT_VALUE_BYTES, TensorHeader, decode_tensor, encode_tensor
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
    MAX_PROMPTS_A_BLOCK,
    OWN_ADAPTER,
    OWN_PREFIXES,
    OWN_PROMPTS,
    Granted,
    Loaded,
    MatrixA,
    MatrixB,
    Prompt,
    Upload,
)
from peerd.protocol.messages.session import Failure
from peerd.protocol.span import Span
from peerd.routing.chains.chain import Hop
from peerd.trio_tools import open_tasks

# Long enough for 64 MB at 2 Mbit/s. A slower client would hold pages for which others wait.
UPLOAD_DEADLINE_S = 300.0

M = TypeVar("M", MatrixA, MatrixB, Prompt)


def needs_of(own: Lora) -> tuple[str, ...]:
    """The features that a hop must have whose blocks' part of the client's adapter is `own`."""
    if not own:
        return ()
    names = {name for (_, name), value in own.items() if isinstance(value, DeepPrompt)}
    prompts = (OWN_PROMPTS,) if PROMPT in names else ()
    prefixes = (OWN_PREFIXES,) if names - {PROMPT} else ()
    return (OWN_ADAPTER, *prompts, *prefixes)


async def receive_adapter(stream: Stream, upload: Upload, blocks: Span) -> dict[BlockModule, LoraPair | DeepPrompt]:
    """Grant an upload and receive what it holds, all of it for `blocks`. Raises InvalidRequest or a PeerFault."""
    if upload.pairs > MAX_PAIRS_A_BLOCK * len(blocks):
        raise InvalidRequest(f"{upload.pairs} pairs for blocks {blocks}: at most {MAX_PAIRS_A_BLOCK} for each block")
    if upload.prompts > MAX_PROMPTS_A_BLOCK * len(blocks):
        raise InvalidRequest(
            f"{upload.prompts} deep prompts and prefixes for blocks {blocks}: at most {MAX_PROMPTS_A_BLOCK} for each"
            " block"
        )
    await stream.send(Granted().to_header())
    receiving = _Receiving(stream, blocks, upload.values)
    try:
        for _ in range(upload.pairs):
            await receiving.pair()
        for _ in range(upload.prompts):
            await receiving.prompt()
    except trio.EndOfChannel:
        announced = f"{upload.pairs} pairs and {upload.prompts} deep prompts and prefixes"
        raise RemoteProtocolError(f"an upload of {announced} ended after {len(receiving.found)}") from None
    return receiving.found


class _Receiving:
    """What has come of one upload, and how many values may still come."""

    def __init__(self, stream: Stream, blocks: Span, values: int) -> None:
        self.found: dict[BlockModule, LoraPair | DeepPrompt] = {}
        self._stream = stream
        self._blocks = blocks
        self._left = values

    async def pair(self) -> None:
        first, a = await self._next(MatrixA)
        _, b = await self._next(MatrixB)
        if not self._is_new(first.block, first.module) or a.shape[0] != b.shape[1]:
            raise InvalidRequest(
                f"matrices {list(b.shape)} x {list(a.shape)} for {first.module} of block {first.block}: the session"
                f" runs blocks {self._blocks}, each layer comes once, and both matrices have one rank"
            )
        self.found[first.block, first.module] = LoraPair(a, b, first.scale)

    async def prompt(self) -> None:
        message, values = await self._next(Prompt)
        if not self._is_new(message.block, message.name):
            raise InvalidRequest(
                f"a {message.name} for block {message.block}: the session runs blocks {self._blocks}, and each has one"
            )
        self.found[message.block, message.name] = DeepPrompt(values)

    def _is_new(self, block: int, name: str) -> bool:
        return self._blocks.start <= block < self._blocks.end and (block, name) not in self.found

    async def _next(self, kind: type[M]) -> tuple[M, torch.Tensor]:
        raw = await self._stream.receive(max_body=self._left * MAX_EXACT_VALUE_BYTES)
        message = parse(raw.header, (kind,))
        matrix = _matrix(message.tensor, raw.body, self._left)
        self._left -= matrix.numel()
        return message, matrix


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
    prompts = sum(isinstance(value, DeepPrompt) for value in own.values())
    values = sum(value.n_values for value in own.values())
    upload = Upload(session=session, hop=number, pairs=len(own) - prompts, values=values, prompts=prompts)
    stream = await connections.open_stream(
        hop.peer_id, ADAPTER_PROTOCOL, addresses=hop.offer.addresses, priority=Priority.BULK
    )
    async with stream:
        try:
            with trio.fail_after(UPLOAD_DEADLINE_S):
                await stream.send(upload.to_header())
                await _expect(stream, Granted)
                async with open_tasks() as tasks:
                    tasks.start_soon(_send_all, stream, own)
                    # The hop may refuse at any time, so we listen while we send.
                    await _expect(stream, Loaded)
                    tasks.cancel_scope.cancel()
        except trio.EndOfChannel:
            raise ConnectionLost(f"{hop.peer_id} ended the upload") from None
        except trio.TooSlowError:
            raise Overloaded(f"the adapter did not reach {hop.peer_id} within {UPLOAD_DEADLINE_S:g} s") from None


async def _expect(stream: Stream, wanted: type[Message]) -> None:
    message = parse((await stream.receive()).header, (wanted, Failure))
    if isinstance(message, Failure):
        raise message.error


async def _send_all(stream: Stream, own: Lora) -> None:
    try:
        # Pairs come first (spec/sessions/adapters.md).
        for (block, module), value in sorted(own.items(), key=lambda item: isinstance(item[1], DeepPrompt)):
            if isinstance(value, DeepPrompt):
                header, body = encode_tensor(value.values)
                await stream.send(Prompt(block=block, tensor=header.to_fields(), name=module).to_header(), body)
                continue
            header, body = encode_tensor(value.a)
            first = MatrixA(block=block, module=module, scale=value.scale, tensor=header.to_fields())
            await stream.send(first.to_header(), body)
            header, body = encode_tensor(value.b)
            await stream.send(MatrixB(tensor=header.to_fields()).to_header(), body)
    except (PeerFault, trio.ClosedResourceError):
        # The task that listens on the stream gets the reason.
        return
