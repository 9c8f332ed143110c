"""When a server draws tokens: as its operator says, or by itself in a private swarm, if the head is small beside it."""

from __future__ import annotations

import pytest

import peerd
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.model.head import output_side_bytes
from peerd.protocol.span import Span
from peerd.spans.budget import serves_head
from peerd.spans.spec import ServeSpec


@pytest.mark.parametrize(
    ("head", "share", "expected"), [(True, 2, True), (False, 100, False), (None, 17, True), (None, 15, False)]
)
def test_a_small_head_is_served_unasked(tiny_llama, head, share, expected):
    with open_checkpoint(tiny_llama) as checkpoint:
        bytes_given = share * output_side_bytes(checkpoint)
        spec = ServeSpec(tiny_llama, head=head, memory_bytes=bytes_given)
        assert serves_head(spec, checkpoint, Span(4, 8)) == expected
        assert serves_head(spec, checkpoint) == expected
        assert not serves_head(spec, checkpoint, Span(0, 4))


@pytest.mark.real_time
@pytest.mark.parametrize(
    ("swarm_key", "head", "expected"), [(None, None, False), (None, True, True), (b"k" * 32, None, True)]
)
async def test_strangers_are_offered_the_head_only_if_the_operator_says_so(tiny_llama, swarm_key, head, expected):
    spec = ServeSpec(tiny_llama, Span(4, 8), kv_tokens=256, throughput=1.0, head=head)
    async with peerd.open_peer(serve=[spec], swarm_key=swarm_key) as peer:
        assert (peer.served[0].head is not None) == expected
