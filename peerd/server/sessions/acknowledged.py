"""Takes the receipts of one hop of a session, and refuses those that say something untrue.

A receipt must acknowledge more than the one before it, and is believed as far as we have computed. An honest client may
be ahead of a new hop, which has not been sent yet what the hop before it in its place had computed.
"""

from __future__ import annotations

from collections.abc import Callable

from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.receipts import Receipt, open_receipt
from peerd.protocol.messages.session import OpenSession

# A client that vanishes leaves less than this unacknowledged; signing and checking take 0.3 ms together.
RECEIPT_EVERY = 1024
# Receipts that may come beyond one for each RECEIPT_EVERY positions that we computed: the last one of the hop, and
# those of positions that the hop before us computed. An honest client sends one or two of them.
_SPARE_RECEIPTS = 16

OnReceipt = Callable[[PeerId, Receipt, bytes, int, bool], None]
"""Takes the client, a valid receipt, its bytes, how many positions it acknowledges beyond those before it, and whether
it is the first of its hop.
"""


def _ignore(client: PeerId, receipt: Receipt, signed: bytes, gained: int, is_first: bool) -> None:
    pass


class Acknowledged:
    """What `client` has acknowledged of the hop that it opened on `server`."""

    def __init__(self, opening: OpenSession, client: PeerId, server: PeerId, on_receipt: OnReceipt = _ignore) -> None:
        #: How many positions were computed here for this session, replays included.
        self.computed = 0
        #: How many of them the client has acknowledged.
        self.positions = 0
        # How many the last receipt said.
        self._said = 0
        self._taken = 0
        self._opening = opening
        self._client = client
        self._server = server
        self._on_receipt = on_receipt

    def __repr__(self) -> str:
        return f"<Acknowledged {self.positions} of {self.computed}>"

    def take(self, signed: bytes) -> None:
        """Count a receipt. Raises RemoteProtocolError for one that no honest client sends."""
        # Before the signature, whose check is what a flood of receipts would cost us.
        self._taken += 1
        if self._taken > self.computed // RECEIPT_EVERY + _SPARE_RECEIPTS:
            raise RemoteProtocolError(f"{self._taken} receipts of {self.computed} positions")
        receipt = open_receipt(signed, client=self._client)
        opening = self._opening
        theirs = receipt.session, receipt.hop, receipt.model, receipt.start, receipt.end, receipt.server
        if theirs != (opening.session, opening.hop, opening.model, opening.start, opening.end, self._server):
            raise RemoteProtocolError("a receipt of another session or hop")
        if receipt.positions <= self._said:
            raise RemoteProtocolError(f"a receipt of {receipt.positions} positions after one of {self._said}")
        self._said = receipt.positions
        before, self.positions = self.positions, min(receipt.positions, self.computed)
        if self.positions > before:
            self._on_receipt(self._client, receipt, signed, self.positions - before, not before)
