"""Paged decode attention against SDPA row by row, for everything that masks, scores or shares.

The kernel is tested where there is a GPU, and on the CPU by Triton's interpreter, in a process of its own: Triton
decides when it is imported which of the two it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from peerd.compute.attention.paged import paged_decode, paged_decode_plain
from peerd.compute.attention.paged_rows import PagedRows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
PAGE = 4
PAGES = 40
LENGTHS = (1, 7, 0, 30, 16)
NO_PAGE = 2**30

needs_kernel = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or Triton's interpreter")


@dataclass(frozen=True)
class Case:
    """Shapes and rules. `window`: how many positions each query sees."""

    heads: int = 6
    kv_heads: int = 2
    key_dim: int = 8
    value_dim: int = 8
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    has_slopes: bool = False


CASES = {
    "as many key heads as heads": Case(kv_heads=6),
    "grouped heads": Case(),
    "one key head": Case(kv_heads=1),
    "more heads in a group than a tile's least": Case(heads=20, kv_heads=1),
    "wider keys than values": Case(key_dim=24, value_dim=5),
    "a width that is no power of two": Case(key_dim=20, value_dim=20),
    "softcap": Case(softcap=1.5),
    "sinks": Case(has_sinks=True),
    "window": Case(window=6),
    "alibi": Case(kv_heads=6, has_slopes=True),
    "all at once": Case(key_dim=12, value_dim=20, window=9, softcap=2.0, has_sinks=True, has_slopes=True),
}
SCALE = 0.4


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@dataclass(frozen=True)
class Problem:
    """A pool in which every slot that no row sees is NaN."""

    case: Case
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    rows: PagedRows
    scores: dict[str, Any]


def problem(case: Case, dtype: torch.dtype = torch.float32, lengths: tuple[int, ...] = LENGTHS) -> Problem:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    pages = torch.randperm(PAGES, generator=generator).tolist()
    keys, values = (
        torch.full((case.kv_heads, PAGES * PAGE, width), torch.nan, dtype=dtype)
        for width in (case.key_dim, case.value_dim)
    )
    first = [max(length - case.window, 0) if case.window else 0 for length in lengths]
    table = torch.full((len(lengths), -(-max(lengths) // PAGE)), NO_PAGE, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for position in range(first[row], length):
            if table[row, position // PAGE] == NO_PAGE:
                table[row, position // PAGE] = pages.pop()
            slot = int(table[row, position // PAGE]) * PAGE + position % PAGE
            keys[:, slot], values[:, slot] = random(case.kv_heads, case.key_dim), random(case.kv_heads, case.value_dim)
    rows = PagedRows(
        table.to(DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        torch.tensor(first, dtype=torch.int32, device=DEVICE),
        PAGE,
    )
    scores: dict[str, Any] = {"scale": SCALE, "softcap": case.softcap}
    if case.has_sinks:
        scores["sinks"] = torch.linspace(-1, 2, case.heads, device=DEVICE)
    if case.has_slopes:
        scores["slopes"] = torch.linspace(0.1, 0.9, case.heads, device=DEVICE)
    query = random(len(lengths), case.heads, case.key_dim)
    return Problem(case, query.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), rows, scores)


def row_by_row(posed: Problem) -> torch.Tensor:
    """`[rows, heads, value_dim]` in fp32, each row alone, by SDPA where it can and by the formula where not."""
    case, rows = posed.case, posed.rows
    results = []
    for row, (first, length) in enumerate(zip(rows.first.tolist(), rows.lengths.tolist(), strict=True)):
        slots = [int(rows.table[row, position // PAGE]) * PAGE + position % PAGE for position in range(first, length)]
        repeats = case.heads // case.kv_heads
        keys, values = (stored[:, slots].float().repeat_interleave(repeats, 0) for stored in (posed.keys, posed.values))
        query = posed.query[row, :, None].float()
        if not slots:
            results.append(torch.zeros(case.heads, case.value_dim, device=DEVICE))
        elif case.softcap is None and not case.has_sinks:
            bias = None
            if case.has_slopes:
                distance = torch.arange(first, length, device=DEVICE) - (length - 1)
                bias = posed.scores["slopes"][:, None, None] * distance
            results.append(F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=SCALE)[:, 0])
        else:
            results.append(by_the_formula(posed, query, keys, values, torch.arange(first, length, device=DEVICE)))
    return torch.stack(results)


def by_the_formula(
    posed: Problem, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    products = query @ keys.transpose(1, 2) * SCALE
    if posed.case.softcap:
        products = torch.tanh(products / posed.case.softcap) * posed.case.softcap
    if posed.case.has_slopes:
        products = products + posed.scores["slopes"][:, None, None] * (positions - positions[-1])
    if posed.case.has_sinks:
        products = torch.cat([products, posed.scores["sinks"][:, None, None]], -1)
    return (products.softmax(-1)[..., : len(positions)] @ values)[:, 0]


def check(decode: Callable[..., torch.Tensor], posed: Problem, tolerance: float = 1e-5, **more: Any) -> None:
    result = decode(posed.query, posed.keys, posed.values, posed.rows, **posed.scores, **more)
    assert result.dtype == posed.values.dtype
    torch.testing.assert_close(result.float(), row_by_row(posed), rtol=tolerance, atol=tolerance)


def test_the_plain_way_is_what_each_row_gives_alone(case: Case):
    check(paged_decode_plain, problem(case))


def test_without_a_gpu_decoding_takes_the_plain_way():
    check(paged_decode, problem(CASES["all at once"]))


@needs_kernel
def test_the_kernel_is_what_each_row_gives_alone(case: Case):
    from peerd.compute.attention.paged_kernel import paged_decode_kernel

    check(paged_decode_kernel, problem(case), parts=2)


@needs_kernel
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16, marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies bfloat16's bits")
        ),
    ],
)
def test_the_kernel_rounds_no_worse_than_its_dtype(dtype: torch.dtype):
    from peerd.compute.attention.paged_kernel import paged_decode_kernel

    check(paged_decode_kernel, problem(CASES["grouped heads"], dtype), tolerance=2e-2, parts=2)


@needs_kernel
def test_the_kernel_takes_contexts_of_many_tiles_and_a_query_with_gaps():
    from peerd.compute.attention.paged_kernel import paged_decode_kernel

    posed = problem(Case(key_dim=256, value_dim=64), lengths=(90, 33))
    wide = torch.stack([posed.query, posed.query + 1], dim=1)
    posed = Problem(posed.case, wide[:, 0], posed.keys, posed.values, posed.rows, posed.scores)
    check(paged_decode_kernel, posed, parts=1)


@needs_kernel
def test_how_many_parts_a_row_has_is_chosen_by_shapes():
    from peerd.compute.attention import paged_kernel

    device = torch.device("cpu")
    assert paged_kernel._parts(1, 64, device) == 1
    assert paged_kernel._parts(1, 100_000, device) == paged_kernel._PROGRAMS_A_PROCESSOR
    assert paged_kernel._parts(1000, 100_000, device) == 1
    posed = problem(CASES["grouped heads"])
    check(paged_kernel.paged_decode_kernel, posed)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="this very run tests the kernel")
def test_all_kernels_pass_their_tests_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = [__file__, str(Path(__file__).parents[1] / "quantized/test_kernel.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "kernel or parts", *files]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("dtype", "width"), [("bf16", 128), ("fp32", 256)])
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_code_compiles_for_devices_that_are_not_here(
    dtype: str, width: int, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """For Ampere and Hopper, down to machine code, within the memory that a program may share."""
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peerd.compute.attention import paged_kernel
    from peerd.compute.quantized import kernel as quantized_kernel

    tile = paged_kernel._tile(width * {"bf16": 2, "fp32": 4}[dtype])
    shapes = {"PARTS": 4, "GROUP": 8, "GROUP_PAD": 16, "PAGE": 16, "TILE": tile, "PRECISION": "ieee"}
    shapes |= {f"{side}_{kind}": width for side in ("KEY", "VALUE") for kind in ("DIM", "PAD")}
    shapes |= {"HAS_SOFTCAP": True, "HAS_SLOPES": True, "HAS_SINKS": True}
    products = {"ROWS_X": 64, "OUTPUTS": quantized_kernel._OUTPUTS, "PRECISION": "ieee"}
    stages = quantized_kernel._STAGES[{"bf16": 2, "fp32": 4}[dtype]]
    types = dict.fromkeys(("query", "keys", "values", "output", "x"), f"*{dtype}")
    types |= dict.fromkeys(("table", "lengths", "firsts"), "*i32") | dict.fromkeys(("scale", "softcap"), "fp32")
    types |= dict.fromkeys(("count", "rows", "columns"), "i32")
    for kernel, constants, staged in (
        (paged_kernel._attend_part, shapes, paged_kernel._STAGES),
        (paged_kernel._join_parts, shapes, paged_kernel._STAGES),
        (quantized_kernel._int8_product, products | {"COLUMNS": quantized_kernel._COLUMNS_INT8}, stages),
        (quantized_kernel._nf4_product, products | {"GROUP": quantized_kernel._GROUP}, stages),
    ):
        own = {name: value for name, value in constants.items() if name in kernel.arg_names}
        stored = {"_int8_product": "*i8", "_nf4_product": "*u8"}.get(kernel.__name__, f"*{dtype}")
        signature = {name: types.get(name, "i32" if name.endswith("stride") else "*fp32") for name in kernel.arg_names}
        signature |= {"values": stored} if "values" in signature else {}
        compiled = triton.compile(
            ASTSource(kernel, signature | dict.fromkeys(own, "constexpr"), constexprs=own),
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": 4, "num_stages": staged, "enable_fp_fusion": True},
        )
        assert "cubin" in compiled.asm
        # What a program of an Ampere GPU for graphics may share at most is less: 99 KiB.
        assert compiled.metadata.shared <= 99 * 1024, (kernel.__name__, compiled.metadata.shared)
