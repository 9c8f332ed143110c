"""Finds the largest logits of a large vocabulary without reading all of its weights in full precision.

A client reads its LM head once for each token. That is as much as a gigabyte for a vocabulary of 128k and a width of
4096, and may take longer than all blocks of the swarm. So a copy in int8 is multiplied first. It gives for each token
a logit and a bound on its error, and so the largest value that the true logit may have. The tokens whose largest value
is among the best, the shortlist, are then computed from the true weights.

The result is exact, not probable: if the `most`-th best of the shortlist is more than any other token may have, no
other token belongs to the best `most`. Otherwise all logits are computed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from peerd.compute.device.measurements import device_name, remembered
from peerd.compute.quantized.formats import INT8_STRIDE

log = logging.getLogger(__name__)

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The exact product of fp32 `[n, width]` with the transposed rows `[tokens, width]` of a vocabulary: fp32."""

# Tokens whose logits are computed from the true weights. In 512 positions of prose through SmolLM2, each of the best 50
# was proven in all; of 256 tokens, in 99.6 %.
SHORTLIST = 1024
# The most positions at a time that the int8 product is measured and used for.
ROWS = (1, 4, 16)
_TURNS = 5
# A smaller head takes less than a millisecond.
_SMALLEST = 1 << 22
# The part of the weights that is timed is larger than most CPU caches, so that it is read from memory.
_TIMED_BYTES = 96 << 20
_SLICE_BYTES = 4 << 20
# The int8 product must take at most this share of the exact one's time.
_GAIN = 0.9
_LARGEST_INT8 = 127
# The product is returned in bf16, which rounds by at most half of this share of it.
_ROUNDING = 2.0**-8
# A sum of n terms in fp32 errs by less than n times this, relative to the product of the norms: once in the int8
# product, once in the exact one.
_SUMMATION = 2 * 2.0**-24


@dataclass(frozen=True, slots=True)
class Shortlist:
    """An int8 copy of a vocabulary's weights `[vocabulary, width]` on the CPU.

    quantized: int8. gains: bf16 [vocabulary], so that a row is about `quantized * gain`.
    errors: fp32 [vocabulary], the norm of the difference. norms: fp32 [vocabulary], of the true rows.
    """

    quantized: torch.Tensor
    gains: torch.Tensor
    errors: torch.Tensor
    norms: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Shortlist:
        """Quantize row by row. Blocks the thread for a second for each gigabyte or so.

        Raises ValueError for a width that torch's int8 product cannot read, since that does not check it.
        """
        vocabulary, width = weight.shape
        if width % INT8_STRIDE:
            raise ValueError(f"a width of {width} is no multiple of {INT8_STRIDE}")
        quantized = torch.empty(vocabulary, width, dtype=torch.int8)
        gains = torch.empty(vocabulary, dtype=torch.bfloat16)
        errors, norms = torch.empty(vocabulary), torch.empty(vocabulary)
        rows = max(1, _SLICE_BYTES // (width * 4))
        for start in range(0, vocabulary, rows):
            own = slice(start, start + rows)
            part = weight[own].float()
            gains[own] = part.abs().amax(1) / _LARGEST_INT8
            gain = gains[own, None].float()
            # A row of zeros has no gain.
            steps = torch.where(gain > 0, part / gain, torch.zeros(())).round_()
            quantized[own] = steps.clamp_(-_LARGEST_INT8, _LARGEST_INT8)  # the gain may have been rounded down
            errors[own] = (part - steps * gain).norm(dim=1)
            norms[own] = part.norm(dim=1)
        return cls(quantized, gains, errors, norms)

    def upper_bounds(self, hidden: torch.Tensor) -> torch.Tensor:
        """The largest logit that each token may have, fp32 [n, vocabulary], for hidden states, fp32 [n, width].

        With h' the hidden state in bf16 and w' the quantized row, the error of h'w' is h'(w - w') + (h - h')w, so by
        Cauchy and Schwarz at most |h'| |w - w'| + |h - h'| |w|, and the rounding of what the product returns.
        """
        half = hidden.bfloat16()
        product = torch._weight_int8pack_mm(half, self.quantized, self.gains).float()
        length = half.float().norm(dim=1, keepdim=True)
        lost = (hidden - half.float()).norm(dim=1, keepdim=True)
        bound = product + product.abs() * _ROUNDING
        bound += length * self.errors
        bound += (lost + length * (_SUMMATION * hidden.shape[1])) * self.norms
        return bound

    def logits(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, most: int, product: Product
    ) -> torch.Tensor:
        """Logits, fp32 [n, vocabulary], of which at least the best `most` of each position are exact.

        The others are exact or -inf. hidden: fp32 [n, width]. weight: what this was made of. bias: [vocabulary].
        """
        bounds = self.upper_bounds(hidden)
        if bias is not None:
            bounds += bias
        # One more than the shortlist: its bound is the best that any token outside may have.
        best = bounds.topk(SHORTLIST + 1, dim=1)
        logits = torch.full_like(bounds, -torch.inf)
        proven = []
        for number, ids in enumerate(best.indices[:, :-1]):
            scores = product(hidden[number : number + 1], weight[ids])[0]
            if bias is not None:
                scores += bias[ids]
            logits[number, ids] = scores
            # NaN proves nothing. Not if equal: of equal logits the lowest token wins, wherever it stands.
            proven.append(bool(scores.topk(most).values[-1] > best.values[number, -1]))
        if not all(proven):
            others = [number for number, is_proven in enumerate(proven) if not is_proven]
            exact = product(hidden[others], weight)
            logits[others] = exact if bias is None else exact + bias
        return logits


def most_positions(weight: torch.Tensor, product: Product) -> int:
    """For how many positions at a time a shortlist is faster than the exact product on this CPU; 0: for none.

    Measured the first time for this CPU, shape, dtype, number of threads and release of torch: a tenth of a second.
    """
    vocabulary, width = weight.shape
    if weight.device.type != "cpu" or weight.numel() < _SMALLEST or vocabulary < 4 * SHORTLIST or width % INT8_STRIDE:
        return 0
    shape = f"{vocabulary}x{width} {str(weight.dtype).removeprefix('torch.')}"
    parts = (device_name(weight.device), f"{torch.get_num_threads()} threads", torch.__version__, shape)
    # The cache remembers no zeros.
    return round(remembered("head_shortlists", " | ".join(parts), lambda: 1 + _measured(weight, product))) - 1


def _measured(weight: torch.Tensor, product: Product) -> int:
    timed = weight[: max(4 * SHORTLIST, _TIMED_BYTES // (weight.shape[1] * weight.element_size()))]
    try:
        shortlist = Shortlist.of(timed)
        best = 0
        for rows in ROWS:
            ratio = _ratio(shortlist, timed, rows, product)
            log.info("the head's int8 shortlist takes %.2f of the exact product's time at %d rows", ratio, rows)
            if ratio > _GAIN:
                return best
            best = rows
    except RuntimeError as error:
        log.info("no int8 shortlist for the head: %s", error)
        return 0
    return best


def _ratio(shortlist: Shortlist, weight: torch.Tensor, rows: int, product: Product) -> float:
    """The shortlist's time divided by the exact product's, each the fastest of some. Infinite if a bound fails."""
    hidden = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
    exact = product(hidden, weight)
    if not bool((exact <= shortlist.upper_bounds(hidden)).all()):
        log.warning("this CPU's int8 product errs more than it may, so the head does without")
        return torch.inf
    ways = partial(shortlist.logits, hidden, weight, None, 1, product), partial(product, hidden, weight)
    turns = [(_seconds(ways[0]), _seconds(ways[1])) for _ in range(_TURNS)]
    return min(short_s for short_s, _ in turns) / min(exact_s for _, exact_s in turns)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
