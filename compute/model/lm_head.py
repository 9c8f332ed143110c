"""Computes logits from hidden states if the vocabulary's weights are half precision.

Transformers multiplies in the weights' dtype, which rounds logits to 8 bits in bf16: near ties then go to the token
that comes first. Here products are summed and kept in fp32. On a CPU the weights are converted slice by slice in one
small buffer, so no fp32 copy of all of them exists. For one position that costs about as much as torch's own
product; for eight, 2.5 times as much on a CPU with bf16 multiplication, and less on one without
(benchmarks/lm_head_bench.py).
"""

from __future__ import annotations

import torch
from torch import nn

# Slices that stay in a core's cache: 4 MiB was as fast as 1 and 2, and 16 MiB took twice as long.
SLICE_BYTES = 4 << 20


class LmHead(nn.Module):
    """A linear map with fp32 results, whatever its weights are stored as. It shares `linear`'s weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., width] to fp32 [..., vocabulary]."""
        weight = self.weight
        if weight.dtype == torch.float32:
            return nn.functional.linear(hidden, weight, self.bias)
        if weight.device.type != "cpu":
            # Other devices sum the product in fp32; only its result is rounded.
            return nn.functional.linear(hidden, weight, self.bias).float()
        logits = _sliced(hidden.reshape(-1, hidden.shape[-1]).float(), weight)
        if self.bias is not None:
            logits += self.bias.float()
        return logits.view(*hidden.shape[:-1], len(weight))


def _sliced(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product of fp32 [n, width] and transposed half-precision [vocabulary, width]: fp32 [n, vocabulary]."""
    vocabulary, width = weight.shape
    logits = torch.empty(len(hidden), vocabulary)
    rows = max(1, SLICE_BYTES // (width * 4))
    buffer = torch.empty(min(rows, vocabulary), width)
    for start in range(0, vocabulary, rows):
        end = min(start + rows, vocabulary)
        part = buffer[: end - start].copy_(weight[start:end])
        logits[:, start:end] = hidden @ part.T
    return logits
