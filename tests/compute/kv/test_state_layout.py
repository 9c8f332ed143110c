"""Running states lie in a row's own pages, none over another, and take little more than their size."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest

from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.families.running_state import RunningState, StateTensor
from peerd.compute.kv.layout import PAGE_TOKENS, lay_out, rollback_room
from peerd.compute.kv.state_layout import STATES, Place, log_positions
from peerd.protocol.messages.session import MAX_LENGTH

CONVOLVED = LayerKind(None, None, 0, 0, 0, state=RunningState("conv", 2048, StateTensor((2048, 3))))
DELTA = LayerKind(
    None,
    None,
    0,
    0,
    0,
    state=RunningState("linear", 2048, StateTensor((8192, 4)), StateTensor((32, 128, 128), in_fp32=True)),
)
FULL = LayerKind(None, None, 8, 64, 64)
# As LFM2-1.2B and Qwen3-Next-80B have them, a cut without attention, and keys wider than values.
SPANS = {
    "lfm2": [CONVOLVED, CONVOLVED, FULL] * 5,
    "qwen3_next": [DELTA, DELTA, DELTA, LayerKind(None, None, 2, 256, 256)] * 12,
    "no attention": [DELTA],
    "wide keys": [CONVOLVED, LayerKind(None, None, 2, 96, 64)],
}


@pytest.mark.parametrize("name", SPANS)
def test_nothing_overlaps_and_little_is_wasted(name: str) -> None:
    kinds = SPANS[name]
    layout = lay_out(kinds, itemsize=2)
    assert layout.states is not None
    places = layout.states.places(64, PAGE_TOKENS)
    taken: list[Place] = []
    values = 0
    for kind, block in zip(kinds, places.blocks, strict=True):
        if kind.state is None:
            assert block is None
            continue
        assert block is not None
        taken += [place for state in block.states for place in state]
        taken += [block.log[number] for number in range(len(block.log))]
        assert (len(block.states), len(block.log)) == (STATES, log_positions(64))
        values += STATES * sum(tensor.values(2) for tensor in kind.state.tensors) + len(block.log) * kind.state.width
    in_order = sorted(taken, key=lambda place: (place.tensor, place.first))
    assert all(a.tensor < b.tensor or a.first + a.rows <= b.first for a, b in pairwise(in_order))
    tokens = layout.state_tokens()
    assert values * 2 <= tokens * layout.bytes_per_token(kinds, 2) <= 1.25 * values * 2


def test_a_session_takes_its_states_once_a_row() -> None:
    layout = lay_out(SPANS["lfm2"], itemsize=2)
    states = layout.state_tokens(max_rollback=4)
    assert layout.tokens_wanted(max_length=1600, max_rows=3, max_rollback=4) == 3 * (1600 + states)


def test_states_of_a_wider_dtype_take_less_of_wider_pages() -> None:
    narrow, wide = (lay_out(SPANS["no attention"], itemsize).state_tokens() for itemsize in (2, 4))
    assert wide < 0.6 * narrow


def test_a_longer_way_back_takes_a_longer_log_and_no_more_states() -> None:
    layout = lay_out([CONVOLVED, FULL], itemsize=4).states
    assert layout is not None
    near, far = (layout.places(rollback_room(back), PAGE_TOKENS) for back in (0, 100))
    values = (far.pages - near.pages) * PAGE_TOKENS * FULL.values_per_token
    assert values == pytest.approx(200 * 2048, rel=0.1)


def test_a_way_back_of_any_length_costs_nothing_to_refuse() -> None:
    layout = lay_out(SPANS["lfm2"], itemsize=2)
    assert layout.states is not None
    tracemalloc.start()
    try:
        # The longest that a client may ask for: a list of places would be of gigabytes.
        tokens = layout.tokens_wanted(max_length=1, max_rollback=MAX_LENGTH)
        for back in range(1000):
            layout.states.places(rollback_room(back), PAGE_TOKENS)
        kept_bytes, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tokens > MAX_LENGTH
    assert most_bytes < 8e6
    assert kept_bytes < 2e6
