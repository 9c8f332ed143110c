"""Measures the logits of 1, 8 and 64 positions with a large vocabulary, beside torch's own product.

    python -m benchmarks.compute.lm_head_bench [--vocabulary 128000] [--width 2048]

It uses one thread. torch's product rounds its results to the weights' dtype, ours does not. The last column has the
time if only the 50 best of each position are wanted, by a shortlist; its input is random, and so flatter than a
model's: what it does not prove it computes again, and the column says for how many positions. To see a CPU that cannot
multiply bf16, set the environment variable `ONEDNN_MAX_CPU_ISA=AVX512_CORE`. The fastest of three rounds counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from peerd.compute.model.lm_head import LmHead, product
from peerd.compute.model.shortlist import Shortlist

POSITIONS = (1, 8, 64)
ROUNDS = 3
BEST = 50


def fastest_ms(call: Callable[[], object]) -> float:
    """Milliseconds of the fastest of some calls, after one that does not count."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--width", type=int, default=2048)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer = nn.Linear(1, 1, bias=False, dtype=dtype)
        weight = torch.randn(arguments.vocabulary, arguments.width, dtype=dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        head = LmHead(layer)
        shortlist = Shortlist.of(weight)
        for positions in POSITIONS:
            hidden = torch.randn(positions, arguments.width, dtype=dtype)
            with torch.no_grad():
                own = fastest_ms(lambda hidden=hidden, head=head: head(hidden))  # type: ignore[misc]
                plain = fastest_ms(lambda hidden=hidden, layer=layer: layer(hidden))  # type: ignore[misc]
                best = partial(shortlist.logits, hidden.float(), weight, None, BEST, product)
                short, again = fastest_ms(best), int(best().isfinite().all(1).sum())
            print(
                f"{dtype} {positions:3} positions: {own:7.1f} ms, torch's own {plain:7.1f} ms,"
                f" the best {BEST} {short:7.1f} ms ({again} computed again)"
            )


if __name__ == "__main__":
    main()
