"""One websocket to a daemon on this machine, for messages with tensors in both directions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import h11
import torch
import trio
import wsproto.utilities
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection, wrap_client_stream

from peerd.local.messages import FROM_DAEMON, MAX_BODY_BYTES, LocalOpen, LocalParameter, message_bytes, read_message
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.encoding.tensors import TensorHeader, decode_tensor, encode_tensor
from peerd.protocol.encoding.wire import MAX_HEADER_BYTES
from peerd.protocol.errors import ConnectionLost, InvalidRequest, NoChain, RemoteProtocolError, Unresponsive
from peerd.protocol.messages.session import Failure
from peerd.trio_tools import open_tasks

RESOURCE = "/peerd/v1/session"
# The daemon is on this machine: if it has not answered after this time, it hangs.
_UPGRADE_S = 30.0
_OPTIONS: dict[str, Any] = {
    "message_queue_size": 4,
    "max_message_size": MAX_BODY_BYTES + MAX_HEADER_BYTES + 8,
    # The library's own 4 KiB make bulk several times slower.
    "receive_buffer_size": 256 * 1024,
}

M = TypeVar("M", bound=Message)
Parameters = Mapping[tuple[int, str], torch.Tensor]
"""LoRA matrices by (block, name), such as `(3, "self_attn.q_proj.lora_A")`."""


class Channel:
    """Messages to and from the daemon. Made by `open_channel`."""

    def __init__(self, websocket: WebSocketConnection, path: Path) -> None:
        self._websocket = websocket
        self._path = path

    async def open(self, wanted: LocalOpen, parameters: Parameters) -> None:
        """Send the first message of this websocket, and the LoRA matrices of its blocks. The daemon's answer comes
        next.
        """
        await self.send(replace(wanted, parameters=len(parameters)))
        for (block, name), matrix in parameters.items():
            await self.send(LocalParameter(block, name, {}), tensor=matrix)

    async def send(self, message: Message, **tensors: torch.Tensor) -> None:
        """Send a message whose fields describe `tensors`, which form its body, in this order.

        Raises InvalidRequest for more than a message holds, ConnectionLost if the daemon has gone.
        """
        body: list[memoryview] = []
        fields: dict[str, Any] = {}
        for name, tensor in tensors.items():
            header, parts = encode_tensor(tensor)
            fields[name] = header.to_fields()
            body += parts
        if sum(part.nbytes for part in body) > MAX_BODY_BYTES:
            raise InvalidRequest(
                f"more than {MAX_BODY_BYTES >> 20} MiB in one message to the daemon: take fewer or shorter rows at once"
            )
        try:
            await self._websocket.send_message(message_bytes(replace(message, **fields), body))
        except (ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError):
            raise self._lost() from None

    async def receive(self, *kinds: type[M]) -> tuple[M, memoryview]:
        """The next message, which must be one of `kinds`, and its body.

        Raises the error that the daemon sends instead, and ConnectionLost if it has gone.
        """
        try:
            data = await self._websocket.get_message()
        except ConnectionClosed:
            raise self._lost() from None
        raw = read_message(data if isinstance(data, bytes | bytearray) else b"")
        message = parse(raw.header, FROM_DAEMON)
        if isinstance(message, Failure):
            # No peer says that there is no chain, so the wire's errors have no such code; a daemon does.
            raise NoChain(message.message) if message.code == NoChain.code else message.error
        if not isinstance(message, kinds):
            raise RemoteProtocolError(f"the daemon on {self._path} said {message.TYPE!r} out of turn")
        return message, raw.body

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(f"the daemon on {self._path} has gone: start it again, then begin anew")


def tensors_of(body: memoryview, headers: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The tensors in a body, one after the other, as their headers describe them."""
    found = []
    for fields in headers:
        header = TensorHeader.from_fields(fields, max_elements=MAX_BODY_BYTES)
        # A copy, because the received bytes are read-only and a caller may write into its gradients.
        found.append(decode_tensor(header, body[: header.body_bytes]).clone())
        body = body[header.body_bytes :]
    return found


@asynccontextmanager
async def open_channel(path: Path) -> AsyncIterator[Channel]:
    """Open a websocket to the daemon whose socket is `path`.

    Raises InvalidRequest if no daemon listens there, Unresponsive if it does not answer; later ConnectionLost.
    """
    try:
        stream = await trio.open_unix_socket(path)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"no peerd listens on {path} ({error}): start one with `peerd --client --model MODEL --bootstrap ADDRESS`,"
            " or name its --socket"
        ) from None
    async with stream:
        try:
            async with open_tasks() as tasks:
                yield Channel(await _upgraded(stream, path, tasks), path)
        except (wsproto.utilities.ProtocolError, h11.ProtocolError, trio.BrokenResourceError) as error:
            raise ConnectionLost(f"the websocket to the daemon on {path} broke: {error!r}") from error


async def _upgraded(stream: trio.SocketStream, path: Path, tasks: trio.Nursery) -> WebSocketConnection:
    try:
        with trio.fail_after(_UPGRADE_S):
            return await wrap_client_stream(tasks, stream, "localhost", RESOURCE, **_OPTIONS)
    except trio.TooSlowError:
        raise Unresponsive(f"the daemon on {path} did not answer within {_UPGRADE_S:g} s: restart it") from None
    except ConnectionRejected as refused:
        raise InvalidRequest(
            f"what listens on {path} offers no tensors (HTTP {refused.status_code}): is it another program?"
        ) from None
    except ConnectionClosed:
        raise ConnectionLost(f"the daemon on {path} hung up") from None
