"""Announces the names of the models that we serve, if too few other peers announce them.

It decides when to look at the catalogue; `routing/directory/catalogue.py` decides who should announce a name.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import trio

from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import ModelRecord
from peerd.routing.dht.record_sets import PartialView, RecordSource
from peerd.routing.directory.catalogue import named_models, should_announce

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint

# The time between looks, varied by half of it. A record lives ten minutes, so a name does not disappear when its
# announcers leave one by one.
LOOK_S = 200.0
# Of a name, which only people read.
_MAX_NAME_CHARS = 96


class ModelNames:
    """The model names that we announce. `run` it while serving. `changed` is called when they change."""

    def __init__(self, source: RecordSource, own: PeerId, changed: Callable[[], None], random: Random) -> None:
        self._source = source
        self._own = own
        self._changed = changed
        self._random = random
        self._words: dict[bytes, ModelRecord] = {}
        self._silent: set[bytes] = set()

    def add(self, words: ModelRecord) -> None:
        """Announce that we serve this model."""
        self._words[words.model] = words
        self._changed()

    def records(self) -> list[ModelRecord]:
        """The records to announce."""
        return [words for model, words in self._words.items() if model not in self._silent]

    async def run(self) -> None:
        """Stop and resume announcing names, depending on what other peers announce, until cancelled."""
        while True:
            await trio.sleep(LOOK_S * self._random.uniform(0.5, 1.5))
            try:
                models = await named_models(self._source)
            except PartialView:
                # Too many announcers are better than none.
                continue
            silent = {model for model in self._words if not should_announce(models, model, self._own)}
            if silent != self._silent:
                self._silent = silent
                self._changed()


def words_for(checkpoint: Checkpoint) -> ModelRecord:
    """The announcement of a checkpoint's name. Reads the digests of its weights; raises CheckpointError."""
    name = "".join(letter for letter in checkpoint.name if letter.isprintable())[:_MAX_NAME_CHARS]
    return ModelRecord(
        seq=0,
        expires=0.0,
        model=checkpoint.model_digest,
        name=name or "model",
        hub_id=checkpoint.hub_id,
        revision=checkpoint.commit,
        block_count=checkpoint.block_count,
    )
