"""Finds a server that lies only sometimes, from audits that failed without showing who lied.

A liar may be honest when it is asked again. But it is part of every chain whose answer it falsified, while its
neighbours change. So a server is convicted once it alone was part of several failed audits. All peers of one public
network count as one, because keys cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

# One audit may fail by a rare coincidence between honest servers; three with the same one do not.
FAILED_AUDITS = 3
# Older ones are forgotten first.
MAX_AUDITS = 64


class Suspects:
    """The audits that failed without a culprit. Servers are named by their voices: a network, or a peer itself."""

    def __init__(self) -> None:
        self._audits: list[frozenset[str]] = []

    def __repr__(self) -> str:
        return f"<Suspects in {len(self._audits)} audits>"

    def note(self, voices: Iterable[str]) -> str | None:
        """Note that at least one of these lied, and return the voice that stands convicted by now, if any does."""
        self._audits = [*self._audits, frozenset(voices)][-MAX_AUDITS:]
        for voice in sorted(self._audits[-1]):
            with_it = [audit for audit in self._audits if voice in audit]
            if len(with_it) >= FAILED_AUDITS and frozenset.intersection(*with_it) == {voice}:
                self.clear(voice)
                return voice
        return None

    def clear(self, voice: str) -> None:
        """Forget the audits that this voice explains."""
        self._audits = [audit for audit in self._audits if voice not in audit]
