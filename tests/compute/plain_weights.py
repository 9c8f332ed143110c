"""The plain span that a quantized one should equal: the same weights, dequantized, in Transformers' own modules."""

from __future__ import annotations

import torch

from peerd.compute.model.span_model import SpanModel
from peerd.compute.quantized.modules import QuantizedLinear, QuantizedStack


def with_weights_of(span: SpanModel, plain: SpanModel) -> SpanModel:
    """`plain`, another load of the same blocks, with the weights that the quantized span has."""
    for name, module in span.named_modules():
        if isinstance(module, QuantizedLinear):
            owner = plain.get_submodule(name)
            turned = type(owner).__name__ == "Conv1D"
            owner.get_parameter("weight").data.copy_(module.weight.t() if turned else module.weight)
        elif isinstance(module, QuantizedStack):
            weights = torch.stack([matrix.dequantize() for matrix in module])
            plain.get_parameter(name).data.copy_(weights)
    return plain
