"""Kernels for few rows and quantized weights, compared with the plain product with the dequantized matrix.

They run on a GPU if there is one; on the CPU `test_paged` starts Triton's interpreter for them.
"""

from __future__ import annotations

import os

import pytest
import torch

from peerd.cli.doctor.trials import kernel_is_right
from peerd.compute.quantized.formats import FORMATS
from peerd.compute.quantized.matrix import QuantizedMatrix

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or Triton's interpreter")


def stored(name: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in a format: values, scales, and what they mean, fp32."""
    form = FORMATS[name]
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    weight[0] = 0.0
    ends = form.ends(rows, columns)
    values, scales = torch.zeros(ends[0], dtype=form.values_dtype), torch.zeros(ends[1])
    form.pack(weight, values, scales)
    return values.to(DEVICE), scales.to(DEVICE), form.unpack(values, scales, (rows, columns), torch.float32).to(DEVICE)


def product(name: str, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rows: int) -> torch.Tensor:
    from peerd.compute.quantized import kernel as quantized_kernel
    from peerd.compute.quantized.formats import _levels

    if name == "int8":
        return quantized_kernel.int8_product(x, values, scales, rows)
    return quantized_kernel.nf4_product(x, values, scales, _levels(x.device), rows)


def test_the_doctor_finds_that_the_kernel_is_right() -> None:
    assert kernel_is_right(DEVICE)


@pytest.mark.parametrize("name", ["int8", "nf4"])
@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 40, 64), (3, 33, 192), (20, 64, 128)])
def test_kernel_products_are_those_with_the_dequantized_matrix(name: str, count: int, rows: int, columns: int):
    values, scales, weight = stored(name, rows, columns)
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(DEVICE)
    torch.testing.assert_close(product(name, x, values, scales, rows), x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_kernel_products_in_half_precision_take_rows_with_gaps(name: str):
    values, scales, weight = stored(name, 32, 64)
    x = torch.randn(2, 2, 64).to(DEVICE, torch.float16)[:, 0]
    found = product(name, x, values, scales, 32)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), x.float() @ weight.T, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_quantized_matrices_use_the_kernel_where_it_may(name: str, monkeypatch: pytest.MonkeyPatch):
    values, scales, weight = stored(name, 24, 64)
    matrix = QuantizedMatrix(FORMATS[name], values, scales, (24, 64), torch.float32)
    x = torch.randn(1, 5, 64).to(DEVICE)
    monkeypatch.setattr("peerd.compute.quantized.formats._has_kernel_for", lambda _: True)
    monkeypatch.setattr(type(FORMATS[name]), "linear", None)
    with torch.inference_mode():
        found = matrix.product(x)
    assert found.shape == (1, 5, 24)
    torch.testing.assert_close(found, x @ weight.T, rtol=1e-4, atol=1e-4)
