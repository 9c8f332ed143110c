"""Decides which refusals of a session's requests to believe, and which peers to leave out meanwhile.

A hop may say that a step is wrong, that its blocks overflow, or that its cache is not what the client thinks it is. The
hop may be right, or it may lie. Or a hop beside it lies, and sent it something else than the client's step. No single
peer may make a user's request fail. So a refusal is believed once no peer has a part in all refusals. Until then the
peer that has a part in most of them is left out, and it is blamed when the request is answered without it. All peers of
one public network count as one, because keys cost nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from peerd.protocol.errors import PeerdError
from peerd.protocol.identity import PeerId

# An honest hop may lack part of a session now and then, so refusals older than this do not count.
FORGOTTEN_S = 600.0


@dataclass(frozen=True, slots=True)
class _Refusal:
    """One refusal by `speaker`; the hops in `beside` may have caused it."""

    error: PeerdError
    speaker: PeerId
    beside: tuple[PeerId, ...]
    at_s: float

    @property
    def peers(self) -> set[PeerId]:
        return {self.speaker, *self.beside}


class Refusals:
    """The refusals of one session.

    tolerated: in how many of them a peer may have a part before it is left out. voice: maps a peer to the network or
        peer as which it counts. now: returns seconds of a steady clock.
    """

    def __init__(self, *, tolerated: int, voice: Callable[[PeerId], str], now: Callable[[], float]) -> None:
        self._tolerated = tolerated
        self._voice = voice
        self._now = now
        self._said: list[_Refusal] = []

    def __repr__(self) -> str:
        return f"<Refusals {len(self._said)}, without {sorted(self.left_out())}>"

    def __bool__(self) -> bool:
        return bool(self._said)

    @property
    def error(self) -> PeerdError:
        """The last refusal; there must be one."""
        return self._said[-1].error

    @property
    def are_believed(self) -> bool:
        """Whether no single peer can be the cause of all of them."""
        if len(self._said) < 2:
            return False
        voices = [{self._voice(peer) for peer in refusal.peers} for refusal in self._said]
        return not set.intersection(*voices)

    def note(self, error: PeerdError, speaker: PeerId, beside: Collection[PeerId] = ()) -> None:
        """Note that `speaker` refuses, and that the hops `beside` it may be the cause."""
        now = self._now()
        self._said = [refusal for refusal in self._said if now < refusal.at_s + FORGOTTEN_S]
        self._said.append(_Refusal(error, speaker, tuple(beside), now))

    def left_out(self) -> set[PeerId]:
        """The peers to leave out: those that have a part in most refusals, and among several of them those that refused
        themselves.
        """
        parts = Counter(self._voice(peer) for refusal in self._said for peer in refusal.peers)
        most = max(parts.values(), default=0)
        if most <= self._tolerated:
            return set()
        suspects = {peer for refusal in self._said for peer in refusal.peers if parts[self._voice(peer)] == most}
        speakers = {refusal.speaker for refusal in self._said} & suspects
        return speakers or suspects

    def settle(self, serving: Collection[PeerId]) -> set[PeerId]:
        """Note that these hops answered the request, and forget its refusals. Returns the peers to blame for them."""
        out = self.left_out() - set(serving)
        speakers = {refusal.speaker for refusal in self._said}
        if out:
            self._said.clear()
        # If none of several suspects refused itself, one may have been the cause and the others not, so none is blamed.
        return out if out <= speakers or len(out) == 1 else set()

    def clear(self) -> None:
        """Forget all refusals, because the request was given up or there are no other peers."""
        self._said.clear()
