"""The adapter that a client uploads for one session: whether it has come, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

from peerd.compute.adapters.lora import Lora
from peerd.exchange.adapter_upload import receive_adapter
from peerd.net.connections import Stream
from peerd.net.limits.owners import Owner
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.messages.adapters import OWN_ADAPTER, Upload
from peerd.protocol.messages.session import OpenSession
from peerd.protocol.span import Span
from peerd.server.quotas import AdapterRoom


class OwnAdapter:
    """A client's own adapter for the session that `opening` asks for, in `room`."""

    def __init__(self, opening: OpenSession, owner: Owner, room: AdapterRoom) -> None:
        self._blocks = Span(opening.start, opening.end)
        self._owner = owner
        self._room = room
        # How many bytes are set aside for it.
        self._held_bytes = 0
        self._state: Literal["none", "awaited", "coming", "there"] = (
            "awaited" if OWN_ADAPTER in opening.needs else "none"
        )

    def __repr__(self) -> str:
        return f"<OwnAdapter {self._state} {self._held_bytes} bytes>"

    @property
    def is_coming(self) -> bool:
        """Whether the client is sending it."""
        return self._state == "coming"

    @property
    def is_missing(self) -> bool:
        """Whether steps must wait for it."""
        return self._state in ("awaited", "coming")

    def check_awaited(self) -> None:
        """Raise InvalidRequest unless the client may send it now."""
        if self._state != "awaited":
            raise InvalidRequest(f"this session waits for no adapter: {self._state}")

    async def take(self, stream: Stream, upload: Upload, give: Callable[[Lora], Awaitable[None]]) -> None:
        """Receive it, and give it to the engine. Raises CallerError, Overloaded or PeerFault; then the client may send
        it again.
        """
        self._state = "coming"
        try:
            with self._room.reserved(self._owner, upload.values) as n_bytes:
                await give(await receive_adapter(stream, upload, self._blocks))
                self._held_bytes = n_bytes
                self._state = "there"
        finally:
            if self.is_coming:
                self._state = "awaited"

    def release(self) -> None:
        """Give its memory back."""
        self._room.release(self._owner, self._held_bytes)
        self._held_bytes = 0
