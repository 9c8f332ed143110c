"""Which refusals of a session's requests to believe, and whom to do without meanwhile.

A hop may say that a step is wrong, that its blocks overflow, or that its cache is not what the client thinks it is. It
may be right. It may lie. Or a hop beside it lies, and sent it something else than the client's step. So no single peer
may make a user's request fail: a refusal is believed once no peer has a part in all of them. Until then the peer that
has a part in most of them is left out, and it is blamed when the request is answered without it. All peers of one
public network are one voice, for keys are free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from peerd.protocol.errors import PeerdError
from peerd.protocol.identity import PeerId

# An honest hop may lack part of a session now and then, so what was said this long ago counts no more.
FORGOTTEN_S = 600.0


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What `speaker` said; `beside` are the hops that may have caused it."""

    error: PeerdError
    speaker: PeerId
    beside: tuple[PeerId, ...]
    at_s: float

    @property
    def peers(self) -> set[PeerId]:
        return {self.speaker, *self.beside}


class Refusals:
    """The refusals of one session.

    tolerated: how many a peer may have a part in before it is left out. voice: who counts as one with a peer.
    now: counts seconds steadily.
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
        """The last that was said; there must be one."""
        return self._said[-1].error

    @property
    def are_believed(self) -> bool:
        """Whether no single peer can be the cause of all of them."""
        if len(self._said) < 2:
            return False
        voices = [{self._voice(peer) for peer in said.peers} for said in self._said]
        return not set.intersection(*voices)

    def note(self, error: PeerdError, speaker: PeerId, beside: Collection[PeerId] = ()) -> None:
        """Note that `speaker` refuses; the hops `beside` it may be the cause."""
        now = self._now()
        self._said = [said for said in self._said if now < said.at_s + FORGOTTEN_S]
        self._said.append(_Refusal(error, speaker, tuple(beside), now))

    def left_out(self) -> set[PeerId]:
        """Whom to do without: who has a part in most of them; of several, those who spoke."""
        parts = Counter(self._voice(peer) for said in self._said for peer in said.peers)
        most = max(parts.values(), default=0)
        if most <= self._tolerated:
            return set()
        suspects = {peer for said in self._said for peer in said.peers if parts[self._voice(peer)] == most}
        speakers = {said.speaker for said in self._said} & suspects
        return speakers or suspects

    def settle(self, serving: Collection[PeerId]) -> set[PeerId]:
        """The request was answered by these hops: whom to blame for the refusals. They are forgotten."""
        out = self.left_out() - set(serving)
        speakers = {said.speaker for said in self._said}
        if out:
            self._said.clear()
        # Of several who never said anything, one may have been the cause, and the others not.
        return out if out <= speakers or len(out) == 1 else set()

    def clear(self) -> None:
        """Forget them: the request was given up, or there is nobody else."""
        self._said.clear()
