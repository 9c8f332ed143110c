"""Chooses a model to serve, out of those that the swarm serves and the operator allows.

Which blocks of the model are served is decided elsewhere. Strangers can put anything into the catalogue. So a model is
opened only if one of the operator's patterns allows it, and before any weights are downloaded, the hub's files of that
commit must match the announcement.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

import trio

from peerd.checkpoints import Checkpoints
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.hub.id import is_commit, parse_hub_id
from peerd.compute.errors import CheckpointError, HubUnavailableError
from peerd.discovery.discovery import Discovery
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.records.envelope import SHARD_BLOCKS
from peerd.routing.dht.record_sets import PartialView
from peerd.routing.directory.catalogue import NamedModel, least_rate, named_models
from peerd.routing.directory.holding import Holding
from peerd.spans.devices import rooms, specs_by_device
from peerd.spans.spec import ServeSpec

log = logging.getLogger(__name__)

# The time between looks while there is no model that we may serve.
LOOK_S = 15.0
# How many models one look opens at most, because each costs the hub a few requests.
MAX_OPENED = 8
# How many models' servers one look looks up, those with most announcers first. Strangers can make up models.
MAX_LOOKED_UP = 64
# How many DHT keys one look looks up at most. A model of 4096 blocks has 256 keys, and strangers can make up models: so
# those with few keys come first. 64 models of 128 blocks have 512 keys.
MAX_KEYS = 512
# A model without servers is looked up again after LOOK_S, and after twice the pause each time, up to this.
MAX_PAUSE_S = 600.0
# How long a model that could not be served is not tried again. Its announcement may have been a mistake.
REFUSED_S = 600.0
# A model that is on this disk is preferred unless another one is needed this many times more: it can serve while the
# other would still be downloading.
ON_DISK_FACTOR = 1.5
# How many of those are remembered; the others are looked up as often as any.
MAX_EMPTY = 1024
# How many models a message names.
_MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A model that we could serve. `rate`: the speed that one more session would get there."""

    spec: ServeSpec
    named: NamedModel
    rate: float
    is_here: bool

    @property
    def rank(self) -> tuple[bool, float]:
        """The key of which the least is served: first models with a block that has no server, then those where a
        session gets least.
        """
        return self.rate > 0, self.rate / (ON_DISK_FACTOR if self.is_here else 1)


# The facts in a model's announcement that may be false: digest, name on the hub, commit and number of blocks.
_Claim = tuple[bytes, str, str, int]


class ModelChoice:
    """One choice for `spec`, which has patterns (`among`) instead of a model."""

    def __init__(self, spec: ServeSpec, discovery: Discovery, checkpoints: Checkpoints) -> None:
        self._spec = spec
        self._discovery = discovery
        self._checkpoints = checkpoints
        # The models on this machine that a pattern names, by digest.
        self._local: dict[bytes, Path] = {}
        # Models that cannot be served, with the reason and the time until which it holds. It does not matter which peer
        # announces them.
        self._refused: dict[_Claim, tuple[str, float]] = {}
        # Models that had no servers: how often in a row, and when to look again.
        self._empty: dict[_Claim, tuple[int, float]] = {}
        self._said = ""

    async def choose(self) -> ServeSpec:
        """The spec for the model that needs us most. Waits until there is one.

        Raises CheckpointError if a path among the patterns is no model.
        """
        await self._open_local()
        while True:
            try:
                models = await named_models(self._discovery.dht)
                found = await self._candidates(models)
            except PartialView as error:
                self._say(f"waiting to see the whole swarm before choosing a model: {error}")
            else:
                if found:
                    best = min(found, key=lambda one: one.rank)
                    log.info(
                        "of the models %s, %s needs another server most",
                        ", ".join(str(one.named) for one in found),
                        best.named,
                    )
                    return best.spec
                self._say(self._why_none(models))
            await trio.sleep(LOOK_S)

    async def _open_local(self) -> None:
        for pattern in self._spec.among:
            for path in await trio.to_thread.run_sync(local_models, pattern):
                async with self._checkpoints.open(path) as checkpoint:
                    # This hashes each weights file once.
                    digest = await trio.to_thread.run_sync(lambda opened: opened.model_digest, checkpoint)
                self._local[digest] = path

    async def _candidates(self, models: Sequence[NamedModel]) -> list[_Candidate]:
        """The models that we may and can serve, and that other peers serve already."""
        now = trio.current_time()
        self._refused = {claim: refusal for claim, refusal in self._refused.items() if now < refusal[1]}
        allowed = ((spec, named) for named in models if (spec := self._spec_of(named)) and not self._why_refused(named))
        # Names without servers must not keep others from being looked up, for strangers can make up any number of them.
        due = list(islice((one for one in allowed if not self._is_empty(one[1], now)), MAX_LOOKED_UP))
        found: list[_Candidate] = []
        opened = keys = 0
        for spec, named in sorted(due, key=lambda one: _keys_of(one[1])):
            keys += _keys_of(named)
            if opened == MAX_OPENED or keys > MAX_KEYS:
                break
            holdings = await self._discovery.directory.holdings(named.digest, named.block_count)
            self._note_servers(named, bool(holdings), now)
            if not holdings:
                continue
            opened += 1
            candidate = await self._open(spec, named, holdings)
            if candidate is not None:
                found.append(candidate)
        return found

    def _is_empty(self, named: NamedModel, now: float) -> bool:
        return now < self._empty.get(_claim_of(named), (0, 0.0))[1]

    def _note_servers(self, named: NamedModel, has_servers: bool, now: float) -> None:
        misses, _ = self._empty.pop(_claim_of(named), (0, 0.0))
        if not has_servers:
            pause_s = min(LOOK_S * 2.0 ** min(misses, 16), MAX_PAUSE_S)
            self._empty[_claim_of(named)] = (misses + 1, now + pause_s)
        # Strangers can make up any number of names.
        while len(self._empty) > MAX_EMPTY:
            del self._empty[next(iter(self._empty))]

    async def _open(self, spec: ServeSpec, named: NamedModel, holdings: Sequence[Holding]) -> _Candidate | None:
        """Open the model's small files: do they match the announcement, and does a block fit here?"""
        try:
            async with self._checkpoints.open(spec.model, spec.revision) as checkpoint:
                is_here = await trio.to_thread.run_sync(_check, spec, named, checkpoint)
        except HubUnavailableError as error:
            log.info("cannot look at %s now: %s", named, error)
        except (CheckpointError, InvalidRequest) as error:
            self._refused[_claim_of(named)] = (str(error), trio.current_time() + REFUSED_S)
            log.warning("not serving %s: %s", named, error)
        else:
            return _Candidate(spec, named, least_rate(holdings, named.block_count), is_here)
        return None

    def _spec_of(self, named: NamedModel) -> ServeSpec | None:
        """How we would serve the model; None if no pattern allows it."""
        if named.digest in self._local:
            return replace(self._spec, model=self._local[named.digest], among=())
        # Only commits are accepted: the owner can change a branch at any time.
        if not is_commit(named.commit) or not parse_hub_id(named.hub_id):
            return None
        if any(fnmatchcase(named.hub_id, pattern) for pattern in self._spec.among):
            return replace(self._spec, model=named.hub_id, revision=named.commit, among=())
        return None

    def _why_refused(self, named: NamedModel) -> str | None:
        reason, until = self._refused.get(_claim_of(named), (None, 0.0))
        return reason if trio.current_time() < until else None

    def _why_none(self, models: Sequence[NamedModel]) -> str:
        allowed = ", ".join(self._spec.among)
        there = ", ".join(str(named) for named in models[:_MAX_NAMED]) or "no model by a name that we know"
        more = f" and {len(models) - _MAX_NAMED} more" if len(models) > _MAX_NAMED else ""
        reasons = "".join(f"; not {named}: {reason}" for named in models if (reason := self._why_refused(named)))
        return f"waiting for a model to serve: the swarm has {there}{more}, --models allows {allowed}{reasons}"

    def _say(self, words: str) -> None:
        """Log a sentence, unless it was the last one logged."""
        if words != self._said:
            self._said = words
            log.info("%s", words)


def _claim_of(named: NamedModel) -> _Claim:
    return named.digest, named.hub_id, named.commit, named.block_count


def _keys_of(named: NamedModel) -> int:
    """How many DHT keys the model's servers have."""
    return (named.block_count - 1) // SHARD_BLOCKS + 1


def local_models(pattern: str) -> list[Path]:
    """The models on this machine that a pattern names: paths with the wildcards * and ?."""
    paths = [Path(found) for found in sorted(glob.glob(str(Path(pattern).expanduser())))]
    return [path for path in paths if path.suffix == ".gguf" or (path / "config.json").exists()]


def _check(spec: ServeSpec, named: NamedModel, checkpoint: Checkpoint) -> bool:
    """Whether as many blocks as we would serve are on disk. Blocks the thread; raises CheckpointError,
    InvalidRequest.
    """
    if checkpoint.model_digest != named.digest or checkpoint.block_count != named.block_count:
        raise CheckpointError("the files under this name are not those that were announced")
    size = spec.blocks if isinstance(spec.blocks, int) else sum(rooms(specs_by_device(spec), checkpoint))
    return len(checkpoint.blocks_on_disk) >= min(size, checkpoint.block_count)
