"""Matrices of packed integers: what is stored, and what is computed with it, is what the grid says."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from peerd.compute.quantized import group_matrix, groups
from peerd.compute.quantized.group_matrix import Choice, GroupMatrix
from peerd.compute.quantized.groups import Codes, GroupForm, Order, group_form, has_kernel, widened

KERNEL, SLICES, SLICES_BF16 = Choice(1 << 20), Choice(0), Choice(0, in_bf16=True)
FORMS = [group_form(bits, group) for bits in (4, 8) for group in (32, 128)]
# Rows that fill the kernel's blocks, and rows that do not; one run and several.
SHAPES = [(64, 128), (70, 256), (1, 128), (1030, 640)]


@dataclass
class Given:
    """Implements `CodeRows` for codes in memory."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def values(self) -> torch.Tensor:
        group = self.codes.shape[1] // self.scales.shape[1]
        scales, zeros = (each.repeat_interleave(group, dim=1) for each in (self.scales, self.zeros))
        return self.codes.float() * scales + zeros

    def read(self, start: int, end: int) -> Codes:
        return Codes(self.codes[start:end], self.scales[start:end], self.zeros[start:end])


def given_codes(form: GroupForm, shape: tuple[int, int], seed: int = 0) -> Given:
    random = torch.Generator().manual_seed(seed)
    count = (shape[0], shape[1] // form.group)
    codes = torch.randint(0, 1 << form.bits, shape, generator=random, dtype=torch.uint8)
    scales = torch.rand(count, generator=random) + 0.1
    return Given(codes, scales, torch.randn(count, generator=random) - form.middle * scales)


def empty(form: GroupForm, shape: tuple[int, int], *, transposed: bool = False) -> GroupMatrix:
    values, scales = form.empty(shape, torch.device("cpu"))
    return GroupMatrix(form, values[0], scales[0], shape, torch.float32, transposed=transposed)


def stored(form: GroupForm, source: Given) -> GroupMatrix:
    matrix = empty(form, source.shape)
    matrix.store_codes(source)
    return matrix


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_torch_has_a_kernel_here() -> None:
    # Without it the tests below would compare slices with slices.
    assert has_kernel(32)


@pytest.fixture(params=[None, Order(64, True), Order(32, True), Order(32, False), Order(16, False)])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Order | None:
    """The orders of other CPUs' kernels; None is this one's."""
    if request.param is not None:
        monkeypatch.setattr(groups, "order_of_halves", lambda: request.param)
        monkeypatch.setattr(group_matrix, "has_kernel", lambda _: False)
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_a_grid_with_short_scales_is_kept_exactly(form: GroupForm, shape: tuple[int, int], order: Order | None) -> None:
    source = given_codes(form, shape)
    # What bfloat16 holds: scales that are powers of two, and an offset of zero.
    source.scales = torch.exp2(source.scales.mul(4).round())
    source.zeros = -form.middle * source.scales
    assert torch.equal(stored(form, source).dequantize(), source.values)


def test_narrow_codes_lose_nothing_among_wider_ones() -> None:
    source = given_codes(group_form(4, 32), (70, 128))
    wide = widened(source.read(0, 70), 4, 8)
    error = stored(group_form(8, 32), Given(wide.codes, wide.scales, wide.zeros)).dequantize() - source.values
    narrow = stored(group_form(4, 32), source).dequantize() - source.values
    assert error.norm() <= 1.1 * narrow.norm()


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_any_grid_is_kept_within_the_rounding_of_its_scales(form: GroupForm) -> None:
    source = given_codes(form, (130, 256))
    wide = [each.repeat_interleave(form.group, dim=1) for each in (source.scales, source.zeros)]
    bound = (wide[0] * (source.codes.float() - form.middle)).abs() + (wide[0] * form.middle + wide[1]).abs()
    error = (stored(form, source).dequantize() - source.values).abs()
    assert (error <= 2**-8 * bound + 1e-5).all()
    assert error.max() > 0


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_plain_weights_are_rounded_to_the_nearest_code(form: GroupForm) -> None:
    torch.manual_seed(1)
    weight = torch.randn(70, 256)
    weight[3], weight[4] = 0.0, 0.37
    matrix = empty(form, (70, 256))
    matrix.store(weight)
    kept = matrix.dequantize()
    assert torch.equal(kept[3], weight[3])
    spread = weight.view(70, -1, form.group).aminmax(dim=2)
    step = ((spread.max - spread.min) / ((1 << form.bits) - 1)).repeat_interleave(form.group, dim=1)
    # Half a step, and a step's rounding at the ends of the range.
    allowed = 0.5 * step + 2**-8 * (spread.max.abs() + spread.min.abs()).repeat_interleave(form.group, dim=1)
    assert ((kept - weight).abs() <= allowed).all()


@pytest.mark.parametrize("choice", [KERNEL, SLICES, SLICES_BF16], ids=["kernel", "slices", "slices in bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_products_are_those_of_the_dequantized_matrix(form: GroupForm, shape: tuple[int, int], choice: Choice) -> None:
    matrix = stored(form, given_codes(form, shape))
    matrix.choice = choice
    weights = matrix.dequantize().double().T
    for rows in (0, 1, 5):
        x = torch.randn(1, rows, shape[1])
        result = matrix.product(x)
        assert result.dtype == torch.float32
        assert result.shape == (1, rows, shape[0])
        error = (result.double() - x.double() @ weights).norm()
        # Rounding grows with the terms of the sums, which may cancel out.
        assert error <= (1e-6 if choice == SLICES else 0.005) * (x.double().abs() @ weights.abs()).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choice", [KERNEL, SLICES], ids=["kernel", "slices"])
def test_products_have_the_dtype_of_the_activations(choice: Choice, dtype: torch.dtype) -> None:
    matrix = stored(FORMS[0], given_codes(FORMS[0], (70, 128)))
    matrix.choice = choice
    x = torch.randn(3, 128).to(dtype)
    assert matrix.product(x).dtype == dtype
    assert distance(matrix.product(x), x.double() @ matrix.dequantize().double().T) <= 0.01


def test_the_number_of_rows_decides_between_kernel_and_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = stored(FORMS[0], given_codes(FORMS[0], (64, 128)))
    matrix.choice = Choice(4)
    used = []
    monkeypatch.setattr(GroupMatrix, "by_kernel", lambda _, x: used.append("kernel") or x.new_zeros(len(x), 64))
    monkeypatch.setattr(GroupMatrix, "by_slices", lambda _, x, dtype: used.append("slices") or x.new_zeros(len(x), 64))
    for rows in (1, 4, 5):
        matrix.product(torch.randn(rows, 128))
    assert used == ["kernel", "kernel", "slices"]


def test_without_a_kernel_slices_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_matrix, "has_kernel", lambda _: False)
    matrix = stored(FORMS[0], given_codes(FORMS[0], (64, 128)))
    matrix.choice = KERNEL
    x = torch.randn(2, 128)
    assert distance(matrix.product(x), x.double() @ matrix.dequantize().double().T) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_gradients_flow_to_the_input(form: GroupForm, dtype: torch.dtype) -> None:
    matrix = stored(form, given_codes(form, (1030, 640)))
    x = torch.randn(2, 3, 640).to(dtype).requires_grad_()
    gradient = torch.randn(2, 3, 1030).to(dtype)
    matrix.product(x).backward(gradient)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    wanted = gradient.double() @ matrix.dequantize().double()
    assert distance(x.grad, wanted) <= (1e-5 if dtype == torch.float32 else 0.01)


def test_a_transposed_matrix_is_multiplied_as_its_users_write_it() -> None:
    form = FORMS[0]
    weight = torch.randn(128, 70)
    matrix = empty(form, (70, 128), transposed=True)
    matrix.store(weight)
    assert matrix.dequantize().shape == weight.shape
    x = torch.randn(3, 128)
    assert distance(x @ matrix, x @ matrix.dequantize()) <= 0.01
    with pytest.raises(TypeError, match="meant for x @ matrix"):
        nn.functional.linear(x, matrix)


@pytest.mark.parametrize(("bits", "group"), [(5, 32), (4, 16), (4, 48)])
def test_formats_that_the_kernel_does_not_know_are_refused(bits: int, group: int) -> None:
    with pytest.raises(ValueError, match="no format"):
        group_form(bits, group)


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_memory_is_the_codes_and_four_bytes_a_group(form: GroupForm) -> None:
    assert form.n_bytes(128, 256) == 128 * 256 * form.bits // 8 + 4 * 128 * 256 // form.group
    matrix = stored(form, given_codes(form, (128, 256)))
    assert matrix.planes.nbytes + matrix.scales.nbytes == form.n_bytes(128, 256)
