"""Triton kernels that multiply a few rows by a quantized matrix, which is read only once, as it is stored.

A decode is limited by how fast weights come from memory. Dequantizing first would read, write and read again, several
times the bytes of the plain matrix. Here each program computes some of the outputs: it walks along their rows and
dequantizes values in registers. Sums are in fp32, so products are at least as exact as with a dequantized matrix.

The formats' layouts are defined in `quantized/formats.py`. In nf4 a byte holds two neighbouring columns, so even and
odd columns are computed as two products, each with its half of `x`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: More rows than this are a prefill: then dequantizing costs little beside the product.
MOST_ROWS = 64
# How many values share a scale in nf4 (`Nf4.group`), and so the columns of one turn of the loop.
_GROUP = 64
# `tl.dot` needs at least this many rows.
_FEWEST_ROWS = 16
_OUTPUTS = 32
_COLUMNS_INT8 = 128
_WARPS = 4
# How many turns load at the same time, by bytes a value of `x`: what fits into 99 KiB of shared memory.
_STAGES = {2: 4, 4: 2}


@triton.jit
def _int8_product(
    x,
    values,
    scales,
    output,
    count,
    rows,
    columns,
    x_stride,
    ROWS_X: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes `OUTPUTS` columns of `x @ (values * scales / 127).T`."""
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS_X)
    is_out = out < rows
    is_row = row < count
    total = tl.zeros([OUTPUTS, ROWS_X], dtype=tl.float32)
    base = values + out.to(tl.int64)[:, None] * columns
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        weight = tl.load(base + column[None, :], mask=is_out[:, None] & inside[None, :], other=0)
        own = tl.load(x + row[None, :] * x_stride + column[:, None], mask=inside[:, None] & is_row[None, :], other=0.0)
        total += tl.dot(weight.to(own.dtype), own, input_precision=PRECISION)
    gain = tl.load(scales + out, mask=is_out, other=0.0) / 127.0
    result = (total * gain[:, None]).to(output.dtype.element_ty)
    tl.store(output + row[None, :] * rows + out[:, None], result, mask=is_out[:, None] & is_row[None, :])


@triton.jit
def _nf4_product(
    x,
    values,
    scales,
    levels,
    output,
    count,
    rows,
    columns,
    x_stride,
    ROWS_X: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes `OUTPUTS` columns of `x @ matrix.T`, for a matrix of 4-bit values with a scale for each `GROUP`
    columns.
    """
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS_X)
    pair = tl.arange(0, GROUP // 2)
    is_out = out < rows
    is_row = row < count
    groups = columns // GROUP
    total = tl.zeros([OUTPUTS, ROWS_X], dtype=tl.float32)
    first = out.to(tl.int64) * groups
    for group in range(0, groups):
        packed = tl.load(
            values + ((first + group) * (GROUP // 2))[:, None] + pair[None, :], mask=is_out[:, None], other=0
        )
        packed = packed.to(tl.int32)
        even = tl.load(levels + (packed >> 4))
        odd = tl.load(levels + (packed & 15))
        here = x + row[None, :] * x_stride + (group * GROUP + 2 * pair)[:, None]
        even_x = tl.load(here, mask=is_row[None, :], other=0.0)
        odd_x = tl.load(here + 1, mask=is_row[None, :], other=0.0)
        part = tl.dot(even.to(even_x.dtype), even_x, input_precision=PRECISION)
        part += tl.dot(odd.to(odd_x.dtype), odd_x, input_precision=PRECISION)
        total += part * tl.load(scales + first + group, mask=is_out, other=0.0)[:, None]
    result = total.to(output.dtype.element_ty)
    tl.store(output + row[None, :] * rows + out[:, None], result, mask=is_out[:, None] & is_row[None, :])


def int8_product(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rows: int) -> torch.Tensor:
    """`x` `[n, columns]`, n at most `MOST_ROWS`, times the transpose of a matrix in `Int8`'s layout: `[n, rows]`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    output = torch.empty(len(x), rows, device=x.device, dtype=x.dtype)
    with torch.cuda.device(x.device) if x.is_cuda else torch.no_grad():
        _int8_product[(triton.cdiv(rows, _OUTPUTS),)](
            x,
            values,
            scales,
            output,
            len(x),
            rows,
            x.shape[1],
            x.stride(0),
            ROWS_X=_padded(len(x)),
            OUTPUTS=_OUTPUTS,
            COLUMNS=_COLUMNS_INT8,
            PRECISION="ieee",
            num_warps=_WARPS,
            num_stages=_STAGES[x.dtype.itemsize],
            enable_fp_fusion=True,
        )
    return output


def nf4_product(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, rows: int
) -> torch.Tensor:
    """`x` `[n, columns]`, n at most `MOST_ROWS`, times the transpose of a matrix in `Nf4`'s layout: `[n, rows]`.

    `levels` are nf4's 16 numbers in fp32. Raises ValueError unless the columns fill whole groups.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.shape[1] % _GROUP:
        raise ValueError(f"{x.shape[1]} columns are no whole groups of {_GROUP}")
    output = torch.empty(len(x), rows, device=x.device, dtype=x.dtype)
    with torch.cuda.device(x.device) if x.is_cuda else torch.no_grad():
        _nf4_product[(triton.cdiv(rows, _OUTPUTS),)](
            x,
            values,
            scales,
            levels,
            output,
            len(x),
            rows,
            x.shape[1],
            x.stride(0),
            ROWS_X=_padded(len(x)),
            OUTPUTS=_OUTPUTS,
            GROUP=_GROUP,
            PRECISION="ieee",
            num_warps=_WARPS,
            num_stages=_STAGES[x.dtype.itemsize],
            enable_fp_fusion=True,
        )
    return output


def _padded(count: int) -> int:
    return max(int(triton.next_power_of_2(count)), _FEWEST_ROWS)
