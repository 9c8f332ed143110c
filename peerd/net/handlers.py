"""Runs the handler of one stream that a peer opened, and ends the stream as the handler ended.

If the handler ends with an error of the protocol, only its stream is reset, with that error's code. Any other exception
is a bug of ours: the stream is reset with `internal`, and `on_bug` is called.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from peerd.net.containment import split
from peerd.net.stream import Stream
from peerd.protocol.errors import InternalError, LocalProtocolError, Overloaded, PeerdError, RemoteProtocolError

log = logging.getLogger(__name__)

StreamHandler = Callable[[Stream], Awaitable[None]]

# Messages that a handler leaves unsent wait this long for the peer to read them. Without a limit a peer that does not
# read would make us keep them.
LEFTOVER_S = 30.0
# What a handler may end with: an error of the protocol, or the end of its stream.
_STREAM_ENDS = (PeerdError, trio.EndOfChannel, trio.ClosedResourceError, trio.BrokenResourceError)


async def run_handler(handler: StreamHandler, stream: Stream, on_bug: Callable[[Exception], None]) -> None:
    """Run a handler; its stream ends with it. `on_bug` gets every exception that is not an error of the protocol."""
    try:
        await handler(stream)
        await _see_off(stream)
    except (Exception, BaseExceptionGroup) as error:
        failure, rest = split(error)
        if failure is not None:
            _end(stream, failure, on_bug)
        if rest is not None:
            raise rest from None


async def _see_off(stream: Stream) -> None:
    """Send the messages that the handler left unsent. What the peer does not read in time is dropped."""
    stream.close()
    if stream.unsent_messages:
        with trio.move_on_after(LEFTOVER_S):
            await stream.wait_drained()
            return
        stream.reset(Overloaded.code)


def _end(stream: Stream, error: Exception, on_bug: Callable[[Exception], None]) -> None:
    fault = _fault(error)
    if fault is not None:
        log.debug("%s ends: %r", stream, fault)
        stream.reset(fault.code if isinstance(fault, PeerdError) else RemoteProtocolError.code)
    else:
        stream.reset(InternalError.code)
        on_bug(error)


def _fault(error: Exception) -> Exception | None:
    """The part of a handler's exception that says how its stream ends; None where the exception is a bug of ours.

    A stream that is closed or broken under a handler has ended, whichever task noticed first.
    """
    if isinstance(error, ExceptionGroup):
        faults = [_fault(part) for part in error.exceptions]
        return None if None in faults else faults[0]
    if isinstance(error, LocalProtocolError):
        return None
    return error if isinstance(error, _STREAM_ENDS) else None
