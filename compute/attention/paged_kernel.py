"""Paged decode attention as a Triton kernel: reads pages where they lie, with rows and heads in parallel.

One program handles one row and one key head, with all query heads that share it, over one part of what the row sees;
a second kernel joins the parts. One row with a long context alone must fill the device, so its positions are
divided. The number of parts must not depend on lengths that only the device knows, or a recorded graph could not be
replayed with other lengths. So the host chooses the number of parts from the shapes, and the device the length of
each, row by row.

Import this only if Triton is installed. `TRITON_INTERPRET=1` runs it on the CPU, for tests.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from peerd.compute.attention.paged_rows import PagedRows

# `tl.dot` needs at least this size on any side.
_FEWEST_HEADS = 16
_FEWEST_WIDTH = 16
# Bytes of a tile of keys: two of these, and as much of values, fit into the shared memory of any device since 2017 (96
# KiB).
_TILE_BYTES = 16 * 1024
_FEWEST_TILE, _MOST_TILE = 16, 128
# This many programs on a multiprocessor hide each other's memory latency.
_PROGRAMS_A_PROCESSOR = 4
# A part with fewer positions costs more to join than it saves.
_FEWEST_PART = 128
_MOST_PARTS = 64
_WARPS, _STAGES = 4, 2


@triton.jit
def _attend_part(
    query,
    keys,
    values,
    table,
    lengths,
    firsts,
    slopes,
    part_values,
    part_tops,
    part_totals,
    query_row_stride,
    query_head_stride,
    key_head_stride,
    key_slot_stride,
    value_head_stride,
    value_slot_stride,
    table_stride,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of one row for one key head: the weighted sum of values, not yet divided, its top score and total."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    kv_heads = tl.num_programs(1)
    length = tl.load(lengths + row)
    first = tl.load(firsts + row)
    share = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), PARTS), TILE) * TILE
    begin = first + part * share
    end = tl.minimum(begin + share, length)

    member = tl.arange(0, GROUP_PAD)
    head = kv_head * GROUP + member
    in_group = member < GROUP
    key_column = tl.arange(0, KEY_PAD)
    value_column = tl.arange(0, VALUE_PAD)
    in_keys = key_column < KEY_DIM
    in_values = value_column < VALUE_DIM
    own = tl.load(
        query + row * query_row_stride + head[:, None] * query_head_stride + key_column[None, :],
        mask=in_group[:, None] & in_keys[None, :],
        other=0.0,
    )
    slope = tl.zeros([GROUP_PAD], dtype=tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes + head, mask=in_group, other=0.0).to(tl.float32)
    # A pool may hold more values than 32 bits can count.
    key_base = keys + kv_head.to(tl.int64) * key_head_stride
    value_base = values + kv_head.to(tl.int64) * value_head_stride

    top = tl.full([GROUP_PAD], float("-inf"), dtype=tl.float32)
    total = tl.zeros([GROUP_PAD], dtype=tl.float32)
    sums = tl.zeros([GROUP_PAD, VALUE_PAD], dtype=tl.float32)
    for start in range(begin, end, TILE):
        position = start + tl.arange(0, TILE)
        inside = position < end
        page = tl.load(table + row * table_stride + position // PAGE, mask=inside, other=0)
        slot = page.to(tl.int64) * PAGE + position % PAGE
        key = tl.load(
            key_base + slot[None, :] * key_slot_stride + key_column[:, None],
            mask=in_keys[:, None] & inside[None, :],
            other=0.0,
        )
        score = tl.dot(own, key, input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            # tanh, in a form that overflows to the right limit.
            score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
        if HAS_SLOPES:
            score += slope[:, None] * (position - (length - 1)).to(tl.float32)[None, :]
        score = tl.where(inside[None, :], score, float("-inf"))
        # Every tile has a position inside, so the new top is a number.
        new_top = tl.maximum(top, tl.max(score, 1))
        fade = tl.exp(top - new_top)
        weight = tl.exp(score - new_top[:, None])
        total = total * fade + tl.sum(weight, 1)
        value = tl.load(
            value_base + slot[:, None] * value_slot_stride + value_column[None, :],
            mask=inside[:, None] & in_values[None, :],
            other=0.0,
        )
        sums = sums * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        top = new_top

    place = (row * kv_heads * GROUP + head) * PARTS + part
    tl.store(part_tops + place, top, mask=in_group)
    tl.store(part_totals + place, total, mask=in_group)
    tl.store(
        part_values + place.to(tl.int64)[:, None] * VALUE_DIM + value_column[None, :],
        sums,
        mask=in_group[:, None] & in_values[None, :],
    )


@triton.jit
def _join_parts(
    part_values,
    part_tops,
    part_totals,
    sinks,
    output,
    HAS_SINKS: tl.constexpr,
    PARTS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Join the parts of one row and query head under one top score, with its sink, and divide by the total."""
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    part = tl.arange(0, PARTS)
    column = tl.arange(0, VALUE_PAD)
    in_values = column < VALUE_DIM
    tops = tl.load(part_tops + place * PARTS + part)
    top = tl.max(tops, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + tl.program_id(1)).to(tl.float32)
        top = tl.maximum(top, sink)
    # A row that sees nothing has no largest score.
    top = tl.where(top == float("-inf"), 0.0, top)
    fade = tl.exp(tops - top)
    total = tl.sum(tl.load(part_totals + place * PARTS + part) * fade, 0)
    if HAS_SINKS:
        total += tl.exp(sink - top)
    sums = tl.load(
        part_values + (place.to(tl.int64) * PARTS + part)[:, None] * VALUE_DIM + column[None, :],
        mask=in_values[None, :],
        other=0.0,
    )
    result = tl.sum(sums * fade[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        output + place.to(tl.int64) * VALUE_DIM + column,
        result.to(output.dtype.element_ty),
        mask=in_values,
    )


def paged_decode_kernel(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    parts: int | None = None,
) -> torch.Tensor:
    """`paged.paged_decode` as a kernel. `parts`, a power of two: how many parts each row has; None: as fits the
    device.
    """
    count, heads, key_dim = query.shape
    kv_heads, _, value_dim = values.shape
    group = heads // kv_heads
    if query.stride(2) != 1:
        query = query.contiguous()
    # The query is converted to the pool's dtype, in which the device multiplies.
    query = query.to(keys.dtype)
    parts = parts or _parts(count * kv_heads, rows.max_tokens, query.device)
    key_pad = max(triton.next_power_of_2(key_dim), _FEWEST_WIDTH)
    value_pad = max(triton.next_power_of_2(value_dim), _FEWEST_WIDTH)
    part_values = torch.empty(count, heads, parts, value_dim, device=query.device, dtype=torch.float32)
    part_tops = torch.empty(count, heads, parts, device=query.device, dtype=torch.float32)
    part_totals = torch.empty_like(part_tops)
    output = torch.empty(count, heads, value_dim, device=query.device, dtype=values.dtype)
    if not count:
        return output
    # Compiled code belongs to a device: Triton asks torch for the current one.
    with torch.cuda.device(query.device) if query.is_cuda else torch.no_grad():
        _attend_part[(count, kv_heads, parts)](
            query,
            keys,
            values,
            rows.table,
            rows.lengths,
            rows.first,
            slopes if slopes is not None else query,
            part_values,
            part_tops,
            part_totals,
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            rows.table.stride(0),
            float(scale),
            float(softcap or 1.0),
            HAS_SOFTCAP=softcap is not None,
            HAS_SLOPES=slopes is not None,
            PARTS=parts,
            GROUP=group,
            GROUP_PAD=max(triton.next_power_of_2(group), _FEWEST_HEADS),
            KEY_DIM=key_dim,
            KEY_PAD=key_pad,
            VALUE_DIM=value_dim,
            VALUE_PAD=value_pad,
            PAGE=rows.page_tokens,
            TILE=_tile(max(key_pad, value_pad) * keys.dtype.itemsize),
            # Otherwise fp32 would be rounded to 10 bits of mantissa.
            PRECISION="ieee",
            num_warps=_WARPS,
            num_stages=_STAGES,
            enable_fp_fusion=True,
        )
        _join_parts[(count, heads)](
            part_values,
            part_tops,
            part_totals,
            sinks if sinks is not None else part_tops,
            output,
            HAS_SINKS=sinks is not None,
            PARTS=parts,
            VALUE_DIM=value_dim,
            VALUE_PAD=value_pad,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return output


def _tile(bytes_a_position: int) -> int:
    """How many positions a program takes at once: a power of two."""
    return min(max(_TILE_BYTES // bytes_a_position, _FEWEST_TILE), _MOST_TILE)


def _parts(programs: int, max_tokens: int, device: torch.device) -> int:
    """How many parts make rows fill the device: a power of two that depends on shapes alone."""
    wanted = _PROGRAMS_A_PROCESSOR * _processors(device) // max(programs, 1)
    most = min(max_tokens // _FEWEST_PART, _MOST_PARTS)
    return 1 << (max(min(wanted, most), 1).bit_length() - 1)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
