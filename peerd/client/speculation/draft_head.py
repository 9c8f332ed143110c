"""A draft head: one layer that guesses from the last hidden states, which the client has anyway.

It costs a fiftieth of a draft model and reads no prompt. Its computations run in a worker thread, one at a time for all
answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
import trio

from peerd.client.speculation.asking import guess
from peerd.client.speculation.confidence import Ask
from peerd.client.speculation.draft_times import DraftTimes
from peerd.client.speculation.drafts import Draft
from peerd.compute.device.failures import is_device_lost, is_out_of_memory
from peerd.compute.drafting.files import read_head
from peerd.compute.drafting.guessing import DraftHead, HeadText
from peerd.compute.model.head import Head
from peerd.protocol.errors import InvalidRequest

log = logging.getLogger(__name__)

# Guesses about nothing, to see how long one takes: the first ones are slower than all later ones.
_WARMING = 2
_TIMED = 4


def load_draft_head(folder: Path, head: Head, name: str, digest: bytes, *, device: str = "cpu") -> HeadSource:
    """Read a draft head for the model `name`, whose head this is. Blocks the thread.

    Raises CheckpointError, and InvalidRequest if it is for a model of other sizes, or does not fit into memory.
    """
    network, facts = read_head(folder)
    made, here = (network.shape.width, network.shape.vocab_size), (head.hidden_size, head.vocab_size)
    if made != here:
        raise InvalidRequest(
            f"{folder.name} cannot draft for {name}: it was made for {facts.model}, with hidden states of {made[0]} and"
            f" {made[1]} tokens, and {name} has {here[0]} and {here[1]}"
        )
    if facts.digest != digest.hex():
        log.warning(
            "the draft head %s was made for other weights of %s: more of its guesses will be wrong; the answers stay"
            " the same",
            folder.name,
            facts.model,
        )
    if (place := torch.device(device)).type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(f"there is no {device} here for the draft head {folder.name}: run it on cpu")
    try:
        drafting = DraftHead(network, head, device)
        return HeadSource(drafting, _measured(drafting))
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InvalidRequest(f"the draft head {folder.name} does not fit into the memory of {device}") from error


def _measured(head: DraftHead) -> DraftTimes:
    text, times = HeadText(head), DraftTimes()
    text.add(0, torch.zeros(1, head.width))
    guesses = text.guesses([0, 0], lambda: None)
    for _ in islice(guesses, _WARMING):
        pass
    began = time.perf_counter()
    count = sum(1 for _ in islice(guesses, _TIMED))
    times.note(count, time.perf_counter() - began)
    return times


class HeadSource:
    """A `DraftSource`: makes a drafter for each answer."""

    def __init__(self, head: DraftHead, times: DraftTimes) -> None:
        self.times = times
        self._head = head
        self._limiter = trio.CapacityLimiter(1)

    def drafter(self, prompt: Sequence[int], length: int) -> HeadDrafter:
        """A drafter for an answer. It reads no prompt."""
        return HeadDrafter(HeadText(self._head), self._limiter)


class HeadDrafter:
    """Guesses one answer's tokens. A `CostlyDrafter`."""

    def __init__(self, text: HeadText, limiter: trio.CapacityLimiter) -> None:
        self._text = text
        self._limiter = limiter
        #: Whether it has hidden states, and the device has not failed.
        self.ready = False
        #: How long the last proposal took to read what the text had gained in a long pause.
        self.reading_s = 0.0
        self._failed = False

    async def propose(self, text: Sequence[int], ask: Ask) -> Draft:
        """The likely tokens, each after those before it."""
        try:
            draft, self.reading_s = await trio.to_thread.run_sync(guess, self._text, text, ask, limiter=self._limiter)
        except RuntimeError as error:
            if not is_out_of_memory(error) and not is_device_lost(error):
                raise
            self._failed, self.ready = True, False
            log.warning("the draft head failed, and the answer goes on without it: %s", error)
            return Draft()
        return draft

    def computed(self, start: int, hidden: torch.Tensor) -> None:
        """Take what the last block gave out, `[n, width]`, for positions from `start` on."""
        self._text.add(start, hidden)
        self.ready = not self._failed

    def end(self) -> None:
        """Guess no more."""
        self.ready = False
