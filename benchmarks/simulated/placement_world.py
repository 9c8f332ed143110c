"""The world in which simulated servers place themselves: its rates, the announcements that are visible in it, and
spans that compute nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random
from typing import Any

import trio

from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import ServerRecord
from peerd.protocol.span import Span
from peerd.routing.directory.announcer import TTL_S
from peerd.routing.directory.holding import Holding
from peerd.server.engine_task import EngineTask
from peerd.server.quotas import AdapterRoom
from peerd.server.served_spans import ServedSpan
from peerd.spans.loading import LoadedSpan
from peerd.testing.fake_engine import FakeEngine

MODEL = bytes(32)
# In a DHT of a thousand peers a put takes a lookup and a round trip, and a get takes as long.
SEEN_AFTER_S = (0.5, 2.0)
LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class World:
    """The properties of a swarm. Rates are for an hour, times in seconds.

    size: the median number of blocks that fit on a server. `spread`: how much servers differ, as the standard deviation
        of the logarithm. join_s: the time within which all servers start. strike_s: when all servers that hold some of
        the first quarter of the blocks crash, for good. fetch_s and load_s: for one block. session_s: how long sessions
        last.
    """

    servers: int
    blocks: int
    size: float
    spread: float = 0.6
    join_s: float = 600.0
    churn_an_hour: float = 0.0
    strike_s: float = math.inf
    fetch_s: float = 10.0
    load_s: float = 2.0
    session_s: float = 60.0


@dataclass(slots=True)
class Board:
    """All announcements as others see them: an announcement appears a little after it is put, and expires."""

    random: Random
    _posts: dict[PeerId, list[_Post]] = field(default_factory=dict)

    def post(self, peer_id: PeerId, records: list[ServerRecord], *, refreshed: bool = True) -> float:
        """Put an announcement, and return when others see it. A server that crashed does not refresh its last one,
        which stays visible until it expires.
        """
        now = trio.current_time()
        posts = self._posts.setdefault(peer_id, [])
        if not refreshed:
            posts[-1].expires = now + self.random.uniform(TTL_S * 2 / 3, TTL_S)
            return now
        seen = max(now + self.random.uniform(*SEEN_AFTER_S), posts[-1].seen if posts else 0.0)
        posts[:] = [post for post in posts[-2:] if post.seen > now or post is posts[-1]]
        posts.append(_Post([Holding(peer_id, record) for record in records], seen))
        return seen

    async def holdings(self, model: bytes, block_count: int) -> list[Holding]:
        await trio.sleep(LOOK_S)
        now = trio.current_time()
        found: list[Holding] = []
        for posts in self._posts.values():
            if now < posts[-1].expires:
                found += next((post.holdings for post in reversed(posts) if post.seen <= now), [])
        return found


@dataclass(slots=True)
class _Post:
    holdings: list[Holding]
    seen: float
    expires: float = math.inf


def fake_record(size: int) -> ServerRecord:
    """Make the part of a server's announcement that is known before it loads."""
    return ServerRecord(
        seq=0,
        expires=0.0,
        model=MODEL,
        span=Span(0, size),
        state="joining",
        dtype="bfloat16",
        quantization="none",
        codecs=("exact",),
        throughput=0.0,
        free_tokens=0,
        max_length=4096,
    )


def fake_span(span: Span, throughput: float) -> tuple[ServedSpan, LoadedSpan]:
    """Make a span that computes nothing."""
    engine: Any = FakeEngine(span, kv_tokens=16)
    family: Any = None
    served = ServedSpan(MODEL, 4096, EngineTask(engine))
    return served, LoadedSpan(engine, "bfloat16", "none", ("exact",), throughput, (), AdapterRoom(), family)
