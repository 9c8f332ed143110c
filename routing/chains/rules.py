"""The client's own rules for its chains: lists of peers, and manifests of the weights.

A manifest is compared with what a peer announces; that the peer really runs it depends on its owner's honesty.
Digests catch mistakes and mixed-up checkpoints; trust is for the peers that the lists name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peerd.protocol.errors import InvalidRequest
from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import block_roots
from peerd.protocol.span import MAX_BLOCKS, Span
from peerd.routing.directory.offer import Offer

_DIGEST_BYTES = 32
# 4096 blocks with 64 hex digits each, and room for white space.
_MAX_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Manifest:
    """The digests that a model and each of its blocks must have (spec/discovery/records.md)."""

    model: bytes
    blocks: tuple[bytes, ...]

    def permits(self, offer: Offer) -> bool:
        """Whether the offer announces exactly these weights. False for an offer without block digests."""
        span = offer.span
        if span.end > len(self.blocks):
            return False
        return offer.record.block_roots == block_roots(span, self.blocks[span.start : span.end])

    def to_json(self) -> str:
        """The manifest as the text of a file."""
        blocks = [digest.hex() for digest in self.blocks]
        return json.dumps({"peerd_manifest": 1, "model": self.model.hex(), "blocks": blocks}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a file that `to_json` made. Raises InvalidRequest."""
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise InvalidRequest(f"{path} is too large for a manifest")
            fields = json.loads(path.read_text())
            if not isinstance(fields, dict) or fields.get("peerd_manifest") != 1:
                raise InvalidRequest(f"{path} is not a manifest of version 1; `peerd manifest` makes one")
            manifest = cls(_digest(fields["model"]), tuple(_digest(block) for block in fields["blocks"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidRequest(f"{path} cannot be read as a manifest: {error}") from None
        if not 0 < len(manifest.blocks) <= MAX_BLOCKS:
            raise InvalidRequest(f"{path} has {len(manifest.blocks)} blocks")
        return manifest


@dataclass(frozen=True, slots=True)
class ChainRules:
    """The client's own rules.

    allowed: the only peers that may be used; None means any peer.
    blocked: peers that are never used.
    trusted: peers that may run the model's first and last blocks, whose inputs and outputs are nearest to the text;
        empty means any peer.
    manifests: the digests that the blocks of their models must have; other models are not bound.
    """

    allowed: frozenset[PeerId] | None = None
    blocked: frozenset[PeerId] = frozenset()
    trusted: frozenset[PeerId] = frozenset()
    manifests: tuple[Manifest, ...] = ()

    def permitted(self, offers: Sequence[Offer]) -> list[Offer]:
        """The offers that may be used in a chain at all."""
        return [offer for offer in offers if self._permits(offer)]

    def ends(self, blocks: Span, block_count: int) -> tuple[frozenset[PeerId] | None, frozenset[PeerId] | None]:
        """The peers that may run the first and the last of `blocks`; None means any peer."""
        first = self.trusted if self.trusted and blocks.start == 0 else None
        last = self.trusted if self.trusted and blocks.end == block_count else None
        return first, last

    def _permits(self, offer: Offer) -> bool:
        if offer.peer_id in self.blocked or (self.allowed is not None and offer.peer_id not in self.allowed):
            return False
        return all(manifest.permits(offer) for manifest in self.manifests if manifest.model == offer.record.model)


def _digest(text: str) -> bytes:
    digest = bytes.fromhex(text)
    if len(digest) != _DIGEST_BYTES:
        raise ValueError(f"a digest has {_DIGEST_BYTES} bytes, not {len(digest)}")
    return digest
