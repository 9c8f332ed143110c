"""Kernel or slices: what a measurement says for each number of rows, which is remembered."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import platformdirs
import pytest
import torch
from torch import nn

from peerd.compute.quantized import product_choice
from peerd.compute.quantized.formats import FORMATS
from peerd.compute.quantized.group_matrix import Choice, GroupMatrix
from peerd.compute.quantized.groups import group_form
from peerd.compute.quantized.matrix import QuantizedMatrix
from peerd.compute.quantized.modules import QuantizedLinear
from peerd.compute.quantized.product_choice import (
    NO_LIMIT,
    Way,
    bf16_over_fp32,
    choice_for,
    choose_products,
    packed_is_faster,
    packed_over_plain,
    quantized_kernel_rows,
    rows_of_kernel,
    seconds_of,
)

FORM = group_form(4, 32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path))
    return tmp_path / "packed_products.json"


def linear(rows: int = 64, columns: int = 128) -> QuantizedLinear:
    values, scales = FORM.empty((rows, columns), torch.device("cpu"))
    made = QuantizedLinear(
        FORM, values[0], scales[0], None, in_features=columns, out_features=rows, dtype=torch.float32
    )
    made.matrix.store(torch.randn(rows, columns))
    return made


def matrix() -> GroupMatrix:
    found = linear().matrix
    assert isinstance(found, GroupMatrix)
    return found


class Clock:
    """A clock on which each way takes the seconds that are given for it; it runs the way to see which it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kernel: Iterable[float], fp32: float, bf16: float) -> None:
        self.calls = 0
        self._kernel, self._slices = (
            dict(zip(product_choice.ROWS, kernel, strict=True)),
            {
                torch.float32: fp32,
                torch.bfloat16: bf16,
            },
        )
        self.took = 0.0
        monkeypatch.setattr(GroupMatrix, "by_kernel", self._by_kernel)
        monkeypatch.setattr(GroupMatrix, "by_slices", self._by_slices)

    def __call__(self, way: Way) -> float:
        self.calls += 1
        way()
        return self.took

    def _by_kernel(self, x: torch.Tensor) -> None:
        self.took = self._kernel[len(x)]

    def _by_slices(self, x: torch.Tensor, dtype: torch.dtype) -> None:
        self.took = self._slices[dtype]


@pytest.mark.parametrize(
    ("kernel", "rows"),
    [((1, 2, 3, 4), NO_LIMIT), ((1, 2, 3, 9), 128), ((1, 2, 9, 9), 32), ((1, 9, 9, 9), 8), ((9, 9, 9, 9), 1)],
)
def test_the_kernel_is_used_up_to_where_slices_are_faster(
    kernel: tuple[float, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, kernel, fp32=5, bf16=1)
    assert rows_of_kernel([matrix()], in_bf16=False, timing=clock) == rows


def test_the_kernel_is_compared_with_slices_in_the_dtype_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, (2, 2, 2, 2), fp32=3, bf16=1)
    assert rows_of_kernel([matrix()], in_bf16=True, timing=clock) == 1
    assert rows_of_kernel([matrix()], in_bf16=False, timing=clock) == NO_LIMIT


def test_slices_in_bfloat16_are_compared_with_slices_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bf16_over_fp32([matrix()], Clock(monkeypatch, (1, 1, 1, 1), fp32=4, bf16=1)) == 0.25


@pytest.mark.parametrize(("bf16", "in_bf16"), [(0.8, True), (0.95, False), (2.0, False)])
def test_bfloat16_must_be_worth_its_rounding(bf16: float, in_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_choice, "bf16_over_fp32", lambda _: bf16)
    monkeypatch.setattr(product_choice, "rows_of_kernel", lambda _, *, in_bf16: 8)
    assert choice_for([matrix()]) == Choice(8, in_bf16)


def test_a_shape_is_measured_once_and_set_on_all_its_matrices(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    measured = []

    def rows_of(matrices: list[GroupMatrix], *, in_bf16: bool) -> int:
        measured.append(len(matrices))
        return 7 * len(measured)

    monkeypatch.setattr(product_choice, "bf16_over_fp32", lambda _: 1.0)
    monkeypatch.setattr(product_choice, "rows_of_kernel", rows_of)
    model = nn.ModuleList([linear(), linear(), linear(192)])
    for _ in range(2):
        choose_products(model)
        assert [part.matrix.choice.kernel_rows for part in model] == [7, 7, 14]  # type: ignore[union-attr]
    assert measured == [2, 1]
    assert "128x64 int4 in groups of 32" in cache.read_text()


@pytest.mark.parametrize(("kernel", "faster"), [(0.3, True), (1.2, False)])
def test_packed_weights_are_faster_if_the_kernel_is_at_all_rows_of_a_decode(
    kernel: float, faster: bool, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    clock = Clock(monkeypatch, (0.1, kernel, 9, 9), fp32=5, bf16=5)
    monkeypatch.setattr(product_choice, "_dense", lambda *_: setattr(clock, "took", 1.0))
    monkeypatch.setattr(product_choice, "packed_over_plain", lambda: packed_over_plain(clock))
    assert packed_is_faster() is faster
    calls = clock.calls
    assert packed_is_faster() is faster
    assert clock.calls == calls
    assert "packed over plain" in cache.read_text()


def test_without_a_kernel_packed_weights_are_not_faster(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(product_choice, "has_kernel", lambda _: False)
    assert not packed_is_faster()
    assert not cache.exists()


def test_both_ways_are_really_timed() -> None:
    assert packed_over_plain() > 0
    found = [matrix(), matrix()]
    assert bf16_over_fp32(found, seconds_of) > 0
    assert rows_of_kernel(found, in_bf16=False, timing=seconds_of) >= 1


def int8(dtype: torch.dtype = torch.bfloat16, columns: int = 128) -> QuantizedLinear:
    form = FORMATS["int8"]
    values, scales = form.empty((64, columns), torch.device("cpu"))
    made = QuantizedLinear(form, values[0], scales[0], None, in_features=columns, out_features=64, dtype=dtype)
    made.matrix.store(torch.randn(64, columns))
    return made


@pytest.mark.parametrize(("slow_from", "rows"), [(1, 0), (16, 4), (1000, 256)])
def test_int8_values_are_multiplied_as_they_are_for_as_many_rows_as_that_is_faster(
    slow_from: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = int8().matrix
    assert isinstance(matrix, QuantizedMatrix)
    monkeypatch.setattr(QuantizedMatrix, "multiply", lambda _, x: x)

    def timing(way: Way) -> float:
        way()
        return 2.0 if matrix.kernel_rows >= slow_from else 1.0 if matrix.kernel_rows else 1.5

    assert quantized_kernel_rows([matrix], timing) == rows


def test_only_int8_matrices_with_a_kernel_are_measured_each_shape_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(product_choice, "quantized_kernel_rows", lambda found: measured.append(len(found)) or 0)
    model = nn.ModuleList([int8(), int8(), int8(torch.float32), int8(columns=96)])
    for _ in range(2):
        choose_products(model)
    assert measured == [2]


def test_the_int8_kernel_computes_what_converted_values_give() -> None:
    part = int8()
    x = torch.randn(3, 128).bfloat16()
    part.matrix.kernel_rows = 0  # type: ignore[attr-defined]
    converted = part(x)
    part.matrix.kernel_rows = 4  # type: ignore[attr-defined]
    assert torch.allclose(part(x).float(), converted.float(), rtol=2**-6, atol=0.1)
