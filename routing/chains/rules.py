"""Whom a client will have in its chains, whatever the swarm announces: lists of peers, and a manifest of the weights.

Knows offers; plans nothing. What a peer announces can be held against a manifest, but only its owner's honesty says
that it runs what it announces: digests catch mistakes and mixed-up checkpoints, trust is for the peers named here.
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
# 4096 blocks of 64 hex digits, with room for white space.
_MAX_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the blocks of a model must be: its digest, and each block's (spec/records.md)."""

    model: bytes
    blocks: tuple[bytes, ...]

    def permits(self, offer: Offer) -> bool:
        """Whether the offer announces just these weights. One that does not say what it has is not permitted."""
        span = offer.span
        if span.end > len(self.blocks):
            return False
        return offer.record.block_roots == block_roots(span, self.blocks[span.start : span.end])

    def to_json(self) -> str:
        """The manifest as a file."""
        blocks = [digest.hex() for digest in self.blocks]
        return json.dumps({"peerd_manifest": 1, "model": self.model.hex(), "blocks": blocks}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read what `to_json` wrote. Raises InvalidRequest."""
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise InvalidRequest(f"{path} is too large for a manifest")
            fields = json.loads(path.read_text())
            if not isinstance(fields, dict) or fields.get("peerd_manifest") != 1:
                raise InvalidRequest(f"{path} is no manifest of version 1: peerd manifest makes one")
            manifest = cls(_digest(fields["model"]), tuple(_digest(block) for block in fields["blocks"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidRequest(f"{path} cannot be read as a manifest: {error}") from None
        if not 0 < len(manifest.blocks) <= MAX_BLOCKS:
            raise InvalidRequest(f"{path} has {len(manifest.blocks)} blocks")
        return manifest


@dataclass(frozen=True, slots=True)
class ChainRules:
    """The client's own rules. `allowed` None: anybody. `trusted` empty: anybody may be first and last.

    trusted: who may run the model's first and last blocks, whose inputs and outputs are nearest to the text.
    manifests: what the blocks of their models must be; other models are not bound by them.
    """

    allowed: frozenset[PeerId] | None = None
    blocked: frozenset[PeerId] = frozenset()
    trusted: frozenset[PeerId] = frozenset()
    manifests: tuple[Manifest, ...] = ()

    def permitted(self, offers: Sequence[Offer]) -> list[Offer]:
        """The offers that may be in a chain at all."""
        return [offer for offer in offers if self._permits(offer)]

    def ends(self, blocks: Span, block_count: int) -> tuple[frozenset[PeerId] | None, frozenset[PeerId] | None]:
        """Who may run the first and the last of `blocks`; None is anybody."""
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
