"""Limits how often peers may ask us questions of the DHT, and store records with us.

A question costs us up to half a millisecond, and a record 0.14 ms, even if its signature turns out to be wrong. The
limits hold for a PeerId and for its public network. A peer beyond them is told `overloaded`: it keeps us in its table
and asks others.
"""

from __future__ import annotations

from typing import Final

from peerd.net.limits.owners import Owner
from peerd.net.limits.rates import Rates

# The most that peerd itself asks one other peer, in a swarm so small that each peer gets every question:
# - announcing: a store for each of 128 keys (8 slots of 16 shards, the limits of `protocol/records/bodies.py`), at most
#   every 2 s (MIN_PERIOD_S in `routing/directory/announcer.py`), and half as many questions to witnesses: 96 a second;
# - using 7 models of 128 blocks: 8 lookups for each every 3 s (CACHE_S in `routing/directory/directory.py`): 19 a
#   second.
QUESTIONS_A_SECOND: Final = 128.0
# A lookup of the largest model is of 256 keys at once; joining takes some dozens more.
QUESTIONS_AT_ONCE: Final = 1024
# Those 128 records every 2 s.
RECORDS_A_SECOND: Final = 128.0
RECORDS_AT_ONCE: Final = 1024
# A network has as much as two peers at their limits: an eighth of one processor for questions, 4 % for records. That is
# enough for a hundred peers that use one model each.
_NETWORK_FACTOR: Final = 2


class QuestionRates:
    """The rates of one process. Every method returns whether the peer may do it now; if so, it is counted."""

    def __init__(self) -> None:
        self._questions = Rates(QUESTIONS_A_SECOND, QUESTIONS_AT_ONCE, network_factor=_NETWORK_FACTOR)
        self._records = Rates(RECORDS_A_SECOND, RECORDS_AT_ONCE, network_factor=_NETWORK_FACTOR)

    def may_ask(self, owner: Owner, now: float) -> bool:
        """For one question."""
        return self._questions.may(owner, now)

    def may_store(self, owner: Owner, records: int, now: float) -> bool:
        """For so many records in one question."""
        return not records or self._records.may(owner, now, records)
