"""How much a swarm can carry, compared with a scheduler that really divides the servers' time."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.protocol.span import Span
from peerd.routing.placement.flow import FlowWithOne, swarm_flow

BLOCKS = 9


def carries(servers, block_count, flow):
    """Whether the servers carry `flow`: block by block, each served first by those whose spans end first."""
    waiting = sorted(servers, key=lambda server: server[0].start)
    open_servers: list[list[float]] = []
    for block in range(block_count):
        while waiting and waiting[0][0].start <= block:
            span, capacity = waiting.pop(0)
            heapq.heappush(open_servers, [span.end, capacity])
        wanted = flow
        while wanted > 1e-9 * flow:
            while open_servers and (open_servers[0][0] <= block or open_servers[0][1] <= 0):
                heapq.heappop(open_servers)
            if not open_servers:
                return False
            taken = min(wanted, open_servers[0][1])
            open_servers[0][1] -= taken
            wanted -= taken
    return True


@st.composite
def spans(draw):
    start = draw(st.integers(0, BLOCKS - 1))
    return Span(start, draw(st.integers(start + 1, BLOCKS)))


SERVERS = st.lists(st.tuples(spans(), st.floats(1, 1000)), max_size=10)


@given(SERVERS)
def test_the_flow_can_be_carried_and_no_more(servers):
    flow = swarm_flow(servers, BLOCKS)
    if flow:
        assert carries(servers, BLOCKS, flow * 0.999)
    assert not carries(servers, BLOCKS, max(flow * 1.001, 1e-6))


def test_a_block_without_a_server_stops_everything():
    assert swarm_flow([(Span(0, 4), 100.0), (Span(5, 9), 100.0)], BLOCKS) == 0
    assert swarm_flow([], BLOCKS) == 0


def test_a_server_spends_its_time_where_others_are_weak():
    # The long one leaves the first half to its neighbour.
    assert swarm_flow([(Span(0, 4), 40.0), (Span(0, 8), 40.0)], 8) == pytest.approx(10.0)


@given(SERVERS, st.integers(1, BLOCKS), st.floats(1, 1000), st.randoms(use_true_random=False))
def test_one_more_server_is_tried_at_every_place_as_if_each_were_solved_alone(servers, size, throughput, random):
    flows = FlowWithOne(servers, size, throughput, BLOCKS)
    starts = list(range(BLOCKS - size + 1))
    expected = [swarm_flow([*servers, (Span(at, at + size), throughput)], BLOCKS) for at in starts]
    random.shuffle(starts)
    for start in starts:
        assert all(
            bound == pytest.approx(flow) if exact else bound >= flow * (1 - 1e-6)
            for bound, exact, flow in zip(flows.bounds, flows.is_exact, expected, strict=True)
        )
        assert flows.solve(start) == pytest.approx(expected[start])


def test_where_a_server_would_not_help_is_known_without_trying():
    flows = FlowWithOne([(Span(0, 8), 40.0), (Span(0, 4), 80.0)], 2, 10.0, 8)
    assert flows.is_exact.tolist() == [True, True, True, False, False, False, False]
