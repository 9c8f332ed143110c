from __future__ import annotations

import pytest
import torch
from torch import nn

from peerd.compute.model.packed_linear import PackedLinear


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(512, 300)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 64])
def test_a_packed_layer_computes_the_same(linear: nn.Linear, rows: int):
    packed = PackedLinear(linear)
    x = torch.randn(1, rows, 512)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), linear(x), rtol=1e-5, atol=1e-5)


def test_the_weight_comes_back_bit_by_bit_and_gradients_flow(linear: nn.Linear):
    packed = PackedLinear(linear)
    assert torch.equal(packed.weight, linear.weight)
    inputs = [torch.ones(2, 512, requires_grad=True) for _ in range(2)]
    packed(inputs[0]).sum().backward()
    linear(inputs[1]).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
