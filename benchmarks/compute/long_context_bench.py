"""Measures how an engine decodes behind long contexts, beside Transformers' own decoder.

    python -m benchmarks.compute.long_context_bench [--contexts 1024 8192 32768] [--families llama gpt_oss]

A decode reads all keys and values before it, whatever numbers they are. So the engine takes a prompt without computing
its attention, and Transformers' cache is filled with random numbers of the same shapes. Then both decode in turns, one
position each, and the fastest turns of each count, in CPU time of one thread.
"""

from __future__ import annotations

import argparse
import time
from typing import Any
from unittest.mock import patch

import torch
from transformers import DynamicCache

from benchmarks.compute.random_checkpoint import checkpoint_of
from peerd.compute.attention.attention import BlockAttention, register_attention
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.model.span_model import SpanModel, load_span
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import RowSlice, SessionSize
from peerd.protocol.span import Span

TURNS = 16
SPAN = Span(0, 2)
CHUNK = 2048
clock = time.thread_time

#: The proportions of published models, at a width that one thread can bear. Those of one family have what it calls so.
_SIZES: dict[str, Any] = {
    "num_hidden_layers": len(SPAN),
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 1 << 17,
    "pad_token_id": 0,
}
_LATENT = {
    "num_key_value_heads": 16,
    # That of the part which rotary embeddings turn.
    "head_dim": 32,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "first_k_dense_replace": len(SPAN),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "gemma2": {"sliding_window": 4096},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
    "deepseek_v3": _LATENT,
}
# Transformers computes capped scores and sinks in its eager attention alone.
_EAGER = ("gemma2", "gpt_oss")


def compared(checkpoint: Checkpoint, context: int) -> str:
    """Milliseconds a position of the engine and of Transformers, and their ratio."""
    name = checkpoint.family.model_type
    model = load_span(checkpoint, SPAN, dtype=torch.float32, attention=register_attention())
    plain = load_span(checkpoint, SPAN, dtype=torch.float32, attention="eager" if name in _EAGER else "sdpa")
    engine = Engine(model, kv_tokens=context + CHUNK)
    fill(engine, model, context)
    own_s, local_s = turns_s(engine, plain, filled_cache(plain, context), context)
    return f"{own_s * 1000:8.2f} {local_s * 1000:12.2f} {own_s / local_s:6.2f}"


def fill(engine: Engine, model: SpanModel, context: int) -> None:
    """Give the engine a session with a prompt of `context` positions, whose attention gives zeros."""
    config: Any = model.config
    width = getattr(config, "v_head_dim", None) or config.head_dim

    def nothing(_: object, query: torch.Tensor, *__: object) -> torch.Tensor:
        return query.new_zeros(1, query.shape[2], query.shape[1], width)

    engine.open("long", SessionSize(context + 2 * TURNS))
    with patch.object(BlockAttention, "__call__", nothing):
        for start in range(0, context, CHUNK):
            step(engine, start, torch.randn(min(CHUNK, context - start), model.hidden_size))


def filled_cache(model: SpanModel, context: int) -> DynamicCache:
    """Transformers' cache behind `context` positions."""
    cache = DynamicCache(config=model.config)
    for layer, kind in enumerate(model.kinds):
        keys, values = (torch.randn(1, kind.kv_heads, context, width) for width in (kind.key_dim, kind.value_dim))
        cache.update(keys, values, layer)
    return cache


def turns_s(engine: Engine, plain: SpanModel, cache: DynamicCache, context: int) -> tuple[float, float]:
    """Seconds of the fastest decode of the engine, and of Transformers."""
    own, local = [], []
    for position in range(context, context + TURNS):
        hidden = torch.randn(1, plain.hidden_size)
        began = clock()
        step(engine, position, hidden)
        own.append(clock() - began)
        began = clock()
        with torch.inference_mode():
            plain(hidden[None], torch.tensor([[position]]), cache)
        local.append(clock() - began)
    return min(own), min(local)


def step(engine: Engine, start: int, hidden: torch.Tensor) -> None:
    """Add positions to the session, and compute them."""
    engine.submit(EngineStep("long", 1, (), (RowSlice(0, start, len(hidden)),), hidden))
    while batch := engine.plan():
        for result in engine.collect(batch, engine.run(batch)):
            assert result.error is None, result.error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("CPU ms a position:     engine Transformers  ratio")
    for name in args.families:
        checkpoint = checkpoint_of(name, {"model_type": name, **_SIZES, **FAMILIES[name]}, "cpu", torch.float32)
        for context in args.contexts:
            print(f"{name:12} {context:7} {compared(checkpoint, context)}", flush=True)


if __name__ == "__main__":
    main()
