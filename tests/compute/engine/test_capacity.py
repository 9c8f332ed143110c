"""The computed capacity is compared with the memory that this process really takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.capacity import (
    LONG_SESSION_POSITIONS,
    Budget,
    block_bytes,
    block_costs,
    fits,
    kv_bytes_per_token,
    span_budget,
)
from peerd.compute.families.layer_kinds import layer_kinds
from peerd.compute.kv.layout import lay_out
from peerd.compute.kv.pool import KVPool
from peerd.compute.model.span_model import load_span
from peerd.compute.quantized.formats import FORMATS, NONE
from peerd.protocol.span import Span

TinyCheckpoint = Callable[[str], Path]


@pytest.fixture
def llama(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    with open_checkpoint(tiny_checkpoint("llama")) as checkpoint:
        return checkpoint


# `test_families.py` has all families.
@pytest.mark.parametrize("quantize", [NONE, *FORMATS])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_a_block_takes_to_the_byte_what_was_predicted(
    tiny_checkpoint: TinyCheckpoint, name: str, quantize: str
) -> None:
    with open_checkpoint(tiny_checkpoint(name)) as checkpoint:
        for dtype in (torch.float32, torch.bfloat16):
            span = load_span(checkpoint, Span(0, 8), quantize=quantize, dtype=dtype)
            sizes = [sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in span.layers]
            assert [cost.n_bytes for cost in block_costs(checkpoint, dtype, quantize)] == sizes
            assert block_bytes(checkpoint, dtype, quantize) == max(sizes)


def test_a_spans_budget_counts_its_own_blocks_and_their_kv(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_checkpoint(tiny_checkpoint("qwen3_moe")) as checkpoint:
        costs = block_costs(checkpoint, torch.float32)
        # Blocks 1 and 5 have no experts, and are smaller.
        assert costs[1].n_bytes < costs[2].n_bytes
        budget = span_budget(checkpoint, Span(0, 3), torch.float32, batch_tokens=16)
        assert budget.blocks == sum(cost.n_bytes for cost in costs[:3])
        kinds = layer_kinds(checkpoint.config)[:3]
        layout = lay_out(kinds)
        pages = layout.page_sets(64, 16) * layout.groups
        pool = KVPool(kinds, layout, pages, 16, device=torch.device("cpu"), dtype=torch.float32)
        taken = sum(tensor.nbytes for tensor in (*pool.keys, *pool.values))
        assert taken == budget.total(64, on_host=False) - budget.blocks - budget.working
        # Of blocks that are not chosen yet the largest counts.
        assert span_budget(checkpoint, 3, torch.float32, batch_tokens=16).blocks == 3 * costs[2].n_bytes


def test_reading_plain_experts_takes_all_of_them_at_once(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_checkpoint(tiny_checkpoint("mixtral")) as checkpoint:
        plain = max(cost.loading_bytes for cost in block_costs(checkpoint, torch.float32))
        # 4 experts of gate and up, [48 + 48, 32] each.
        assert plain == 4 * 96 * 32 * 4


def test_sizes_are_known_without_any_weights_file_being_read(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_checkpoint(tiny_checkpoint("mixtral")) as checkpoint:
        before = checkpoint.bytes_read
        assert fits(checkpoint, 2**40, dtype=torch.float16, batch_tokens=16, quantize="nf4") == 8
        assert checkpoint.bytes_read == before


def test_kv_takes_keys_and_values_of_every_head(llama: Checkpoint) -> None:
    assert kv_bytes_per_token(llama, torch.float16) == 2 * 2 * 16 * 2


@pytest.mark.parametrize("on_host", [True, False])
def test_as_many_blocks_fit_as_memory_holds_with_their_kv_and_all_else(llama: Checkpoint, on_host: bool) -> None:
    def needed(blocks: int) -> int:
        budget = span_budget(llama, blocks, torch.float32, batch_tokens=16, on_host=on_host)
        return budget.total(100_000, on_host=on_host)

    def fitting(room: int) -> int:
        return fits(llama, room, dtype=torch.float32, batch_tokens=16, kv_tokens=100_000, on_host=on_host)

    assert fitting(0) == 0
    assert fitting(needed(1) - 1) == 0
    assert fitting(needed(1)) == 1
    assert fitting(needed(4) - 1) == 3
    assert fitting(needed(4)) == 4
    assert fitting(1000 * needed(8)) == 8


def test_kv_fills_what_is_left_and_no_more() -> None:
    budget = Budget(blocks=1000, loading=800, kv_per_token=10, host_per_token=3, working=100, process=50)
    fixed = 1000 + 100 + 50 + 16 * 10
    for room in (1850, 1851, 1862, 1863, 10_000):
        tokens = budget.kv_tokens_in(room, on_host=True)
        assert tokens == (room - fixed) // 13
        assert budget.total(tokens, on_host=True) <= room < budget.total(tokens + 1, on_host=True)
    # What reading takes is given back before there is any KV, but has to be there.
    assert budget.kv_tokens_in(1849, on_host=True) < 0
    assert budget.kv_tokens_in(1800, on_host=False) == (1800 - 1260) // 10


@pytest.mark.parametrize("longest", [None, 9000, 20_000])
def test_a_session_that_may_become_longer_than_usual_leaves_room_for_its_batches(longest: int | None) -> None:
    budget = Budget(
        blocks=1000,
        loading=800,
        kv_per_token=10,
        host_per_token=3,
        working=100,
        process=50,
        working_per_position=7,
        positions_per_token=2,
        longest=longest,
    )
    assert budget.working_with(LONG_SESSION_POSITIONS // 2) == 100
    assert budget.working_with(LONG_SESSION_POSITIONS // 2 + 1) == 100 + 2 * 7
    if longest is not None:
        assert budget.working_with(10**6) == 100 + (longest - LONG_SESSION_POSITIONS) * 7
    for room in (2000, 60_000, 70_000, 100_000, 200_000, 300_001):
        tokens = budget.kv_tokens_in(room, on_host=True)
        assert budget.total(tokens, on_host=True) <= room < budget.total(tokens + 1, on_host=True)


def test_scores_of_a_long_context_count_where_attention_keeps_them(tiny_checkpoint: TinyCheckpoint) -> None:
    def added(name: str) -> int:
        with open_checkpoint(tiny_checkpoint(name)) as checkpoint:
            checkpoint.config.max_position_embeddings = 100_000
            budget = span_budget(checkpoint, Span(0, 2), torch.float32, batch_tokens=16)
            assert budget.longest == checkpoint.max_length
            heads = checkpoint.config.num_attention_heads
            kv = 2 * kv_bytes_per_token(checkpoint, torch.float32)
            mask = 2 * 16 * 4
            return (budget.working_per_position - kv - mask) // heads

    # In fp32, with a copy for softmax and one for its result, for each of a batch's positions.
    assert added("gpt_oss") == 3 * 16 * 4
    assert added("llama") == 0


def test_what_a_hop_keeps_of_long_rows_counts_where_windows_make_kv_short(tiny_checkpoint: TinyCheckpoint) -> None:
    def kept(name: str) -> int:
        with open_checkpoint(tiny_checkpoint(name)) as checkpoint:
            return span_budget(checkpoint, Span(0, 2), torch.float32, batch_tokens=16).host_per_token

    # 512 positions in the KV of 384: a window of 16, what may be rolled back, and a batch.
    assert kept("mistral") == 2 * kept("llama")


def test_without_a_wish_there_is_room_for_one_conversation(llama: Checkpoint) -> None:
    room = span_budget(llama, 2, torch.float32, batch_tokens=16).total(512, on_host=True)
    assert fits(llama, room, dtype=torch.float32, batch_tokens=16) == 2
    assert fits(llama, room - 1, dtype=torch.float32, batch_tokens=16) == 1


def test_quantized_more_blocks_fit(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_checkpoint(tiny_checkpoint("llama")) as checkpoint:
        plain, int8, nf4 = (block_bytes(checkpoint, torch.bfloat16, name) for name in (NONE, *FORMATS))
    assert plain > 1.7 * int8
    assert int8 > 1.6 * nf4
