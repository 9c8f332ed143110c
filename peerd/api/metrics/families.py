"""The names of all figures, with what they mean: the one table from which answers, tests and the dashboard follow.

A label takes one of a few values that we write ourselves, or a model's name, which the operator chose. PeerIds,
addresses and other text of strangers are in none: keys cost nothing, and a Prometheus server keeps each value of
a label for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Family:
    """Figures with one name. A counter's samples are called `name` with `_total`; a histogram's `_bucket`, `_sum` and
    `_count`.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()

    @property
    def samples(self) -> frozenset[str]:
        """The names of its samples, as a query writes them."""
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        return frozenset(self.name + ending for ending in endings[self.kind])


FAMILIES = {
    family.name: family
    for family in (
        Family("peerd_build", "gauge", "1, with the version that runs.", ("version",)),
        Family("peerd_uptime_seconds", "gauge", "Seconds since the local API was opened."),
        # The answers that programs on this machine get.
        Family("peerd_tokens", "counter", "Tokens of answers to programs on this machine."),
        Family("peerd_prompt_tokens", "counter", "Tokens of the prompts of these answers."),
        Family("peerd_cached_tokens", "counter", "Those of them that the session of an earlier answer had computed."),
        Family("peerd_resting_tokens", "gauge", "Positions of the sessions that rest for a next turn."),
        Family("peerd_answers", "counter", "Those answers, by how they ended.", ("end",)),
        Family("peerd_answering", "gauge", "Requests that are being answered now."),
        Family("peerd_first_token_seconds", "histogram", "From the start of an answer to its first token."),
        Family("peerd_between_tokens_seconds", "histogram", "From one token of an answer to its next."),
        Family("peerd_speculation_drafted", "counter", "Guessed tokens that were sent with steps."),
        Family("peerd_speculation_accepted", "counter", "Guessed tokens that were right."),
        Family("peerd_failovers", "counter", "Hops of chains that were replaced in mid-answer."),
        Family("peerd_hop_delay_seconds", "histogram", "Round trip to a hop when it joined one of our chains."),
        Family("peerd_audits", "counter", "Answers chosen for an audit, and how audits ended.", ("outcome",)),
        Family("peerd_coverage_ratio", "gauge", "Share of a model's blocks that have a server.", ("model",)),
        # What we serve to others.
        Family("peerd_served_blocks", "gauge", "Blocks that this peer serves."),
        Family("peerd_sessions", "gauge", "Sessions that hold KV memory here."),
        Family("peerd_kv_tokens", "gauge", "KV memory of all spans, in positions.", ("state",)),
        Family("peerd_steps", "counter", "Steps of sessions, by how they ended.", ("end",)),
        Family("peerd_queued_seconds", "histogram", "How long a step waited before a batch took it."),
        Family("peerd_batch_sessions", "histogram", "Steps in a batch."),
        Family("peerd_batch_positions", "histogram", "Positions in a batch."),
        Family("peerd_batch_seconds", "histogram", "How long a batch took."),
        # The network.
        Family("peerd_tensor_bytes", "counter", "Bytes of hidden states, by codec.", ("codec", "direction")),
        Family("peerd_connected_peers", "gauge", "Peers that are connected, by the way to them.", ("way",)),
        Family("peerd_dht_contacts", "gauge", "Peers in the routing table of the DHT."),
        Family("peerd_reach", "gauge", "1 for whether others can dial this peer.", ("state",)),
        Family("peerd_relays_used", "gauge", "Relays that reach this peer."),
        Family("peerd_relayed_peers", "gauge", "Peers for which this peer is a relay."),
        Family("peerd_relayed_connections", "gauge", "Connections that it carries as a relay."),
        Family("peerd_relayed_bytes", "counter", "Bytes that it has passed on as a relay."),
        Family("peerd_avoided_peers", "gauge", "Servers that our own chains leave out now."),
        Family("peerd_refused_peers", "gauge", "Peers and addresses that did something wrong lately."),
        Family("peerd_contained_bugs", "counter", "Bugs that were contained; each is in the log.", ("place",)),
    )
}
