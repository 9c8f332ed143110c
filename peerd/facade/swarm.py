"""Runs the model's remote blocks: a span of hidden states becomes a pass, or a step of the caller's cache."""

from __future__ import annotations

import torch

from peerd.facade.backend import Backend
from peerd.facade.blocks import Call
from peerd.facade.lora import adapters_of, lora_of
from peerd.facade.passes import run_pass
from peerd.facade.steps import finish_run, new_mask, run_step
from peerd.protocol.span import Span


class Swarm(Backend):
    """The blocks of one model, as its decoder's layers call them."""

    def run(self, call: Call, span: Span, hidden: torch.Tensor) -> torch.Tensor:
        """Run `hidden` `[rows, columns, width]` through `span`; padding columns of the result are zeros.

        Raises ValueError and NotImplementedError for what servers cannot compute, and peerd's own errors.
        """
        if hidden.dim() != 3 or hidden.shape[2] != self.blocks.facts.width or not hidden.numel():
            raise ValueError(
                f"hidden states are [rows, columns, {self.blocks.facts.width}], at least one of each, not"
                f" {list(hidden.shape)}"
            )
        cache = call.cache
        run = cache.runs.get(call.run_key) if cache is not None else None
        # A session keeps the adapter with which it was opened; finding it again at every token would cost a
        # millisecond.
        lora = run.lora if run is not None else lora_of(self.layers[span.start : span.end])
        if run is None:
            self.check_adapters(adapters_of(lora))
        if cache is None:
            return run_pass(self, call, span, hidden, dict(lora))
        if not (cache.lazy and not cache.computed):
            return run_step(self, call, cache, span, hidden, lora)
        output = run_pass(self, call, span, hidden, dict(lora))
        cache.inputs[call.run_key] = hidden.detach()
        rows, columns, _ = hidden.shape
        finish_run(call, cache, new_mask(call, rows, columns), rows, columns)
        return output
