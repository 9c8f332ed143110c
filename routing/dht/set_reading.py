"""Reads one set of records from the peers that hold it, without having the same records sent by each of them.

A full set has 256 records, 80 kB, and eight peers are asked for it. So the first peer is asked for the records, and the
others may answer with their digests alone. What those have and nobody has sent yet is fetched afterwards, each record
from one of the peers that say that they have it, and from all others of them if that peer does not send it.

Digests are salted by each lookup: a stranger who could choose a record whose digest is that of another one would hide
that other one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import trio
from kademlia.node import Node

from peerd.routing.dht.lookup import GIVE_UP_S
from peerd.routing.dht.messages import DIGEST_BYTES, WHOLE_SET_BYTES
from peerd.routing.dht.table import PeerNode


class Reply(Protocol):
    """What one peer said about the set."""

    @property
    def records(self) -> tuple[bytes, ...]: ...
    @property
    def digests(self) -> tuple[bytes, ...]: ...


A = TypeVar("A", bound=Reply, covariant=True)


class Asking(Protocol[A]):
    """Our end of the protocol."""

    async def call_find_value(
        self, node_to_ask: PeerNode, node_to_find: Node, salt: bytes = b"", only: Sequence[bytes] = ()
    ) -> A | None: ...


def digest_of(salt: bytes, record: bytes) -> bytes:
    """The digest of an encoded record in one lookup."""
    return hashlib.blake2b(record, digest_size=DIGEST_BYTES, key=salt).digest()


def digests_of(salt: bytes, records: Iterable[bytes]) -> tuple[bytes, ...]:
    """The digests of encoded records, in their order."""
    return tuple(digest_of(salt, record) for record in records)


def answer_of(records: Sequence[bytes], salt: bytes, only: Sequence[bytes]) -> tuple[tuple[bytes, ...], bool]:
    """Which of a set's records answer a question, and whether their digests do instead."""
    if only:
        wanted = set(only)
        return tuple(record for record in records if digest_of(salt, record) in wanted), False
    if not salt or sum(map(len, records)) <= WHOLE_SET_BYTES:
        return tuple(records), False
    return (), True


R = TypeVar("R", bound=Reply)


class SetReader(Generic[R]):
    """One lookup of the records under one key. `ask` is for the peers of the lookup, `complete` for afterwards."""

    def __init__(self, protocol: Asking[R], salt: bytes) -> None:
        self._protocol = protocol
        self._salt = salt
        #: Peers that said that they have records which nobody sent. Their answers are no whole ones.
        self.unsent: set[bytes] = set()
        self._is_asked_for_all = False
        self._answers: list[tuple[PeerNode, R]] = []
        self._data: set[bytes] = set()
        # The digests that were named, and those of records that we have.
        self._claimed: set[bytes] = set()
        self._known: set[bytes] = set()
        # The peers that were asked for single records and have not answered yet.
        self._waiting: set[bytes] = set()
        self._heard = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<SetReader {self._salt.hex()}>"

    async def ask(self, node: PeerNode, target: Node) -> R | None:
        """A peer's answer: the first is asked for its records, the others may say which they have."""
        salt = self._salt if self._is_asked_for_all else b""
        self._is_asked_for_all = True
        reply = await self._protocol.call_find_value(node, target, salt)
        if reply is not None:
            self._answers.append((node, reply))
        return reply

    async def complete(self, target: Node, held: Iterable[bytes]) -> set[bytes]:
        """All records that were answered, and those that peers have beyond these and those `held` here. Takes at most
        2 s.
        """
        replies = self._answers
        self._data = {record for _, reply in replies for record in reply.records}
        self._claimed = {digest for _, reply in replies for digest in reply.digests}
        if not self._claimed:
            return self._data
        self._known = set(digests_of(self._salt, self._data | set(held)))
        asked: set[bytes] = set()
        async with trio.open_nursery() as nursery:
            await self._fetch_missing(nursery, target, asked, once=True)
            await self._fetch_missing(nursery, target, asked, once=False)
            nursery.cancel_scope.cancel()
        self.unsent = {node.id for node, reply in self._answers if not self._known.issuperset(reply.digests)}
        return self._data

    async def _fetch_missing(self, nursery: trio.Nursery, target: Node, asked: set[bytes], *, once: bool) -> None:
        """Ask peers that were not asked yet, and wait until nothing is missing or all have answered; but not for long:
        a peer may say what it has and then be silent.
        """
        for node, digests in _shares(self._answers, self._known, asked, once=once):
            asked.add(node.id)
            self._waiting.add(node.id)
            nursery.start_soon(self._fetch, node, target, digests)
        with trio.move_on_after(GIVE_UP_S):
            while self._waiting and not self._claimed <= self._known:
                await self._heard.park()

    async def _fetch(self, node: PeerNode, target: Node, digests: Sequence[bytes]) -> None:
        wanted = digests
        reply = await self._take(node, target, wanted)
        if reply is not None and not self._known.issuperset(wanted):
            # Records are renewed all the time: what it said that it has may have been replaced by a newer one since.
            anew = await self._take(node, target)
            if anew is not None:
                self._answers = [(one, anew if one.id == node.id else said) for one, said in self._answers]
                self._claimed = {digest for _, said in self._answers for digest in said.digests}
                wanted = [digest for digest in anew.digests if digest not in self._known]
                if wanted:
                    await self._take(node, target, wanted)
        self._waiting.discard(node.id)
        self._heard.unpark_all()

    async def _take(self, node: PeerNode, target: Node, only: Sequence[bytes] = ()) -> R | None:
        """Ask a peer, and keep the records that it sends."""
        reply = await self._protocol.call_find_value(node, target, self._salt, only)
        if reply is not None:
            self._data.update(reply.records)
            self._known.update(digests_of(self._salt, reply.records))
        return reply


def _shares(
    replies: Iterable[tuple[PeerNode, Reply]], known: set[bytes], asked: set[bytes], *, once: bool
) -> list[tuple[PeerNode, list[bytes]]]:
    """What to fetch from which peers that were not asked yet: each record from the first that has it (`once`), or from
    all.
    """
    taken = set(known)
    shares = []
    for node, reply in replies:
        if node.id in asked:
            continue
        missing = [digest for digest in reply.digests if digest not in taken]
        if missing:
            shares.append((node, missing))
            if once:
                taken.update(missing)
    return shares
