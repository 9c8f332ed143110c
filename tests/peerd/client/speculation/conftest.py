"""A tiny model of bytes, and a controller that always asks and sends all."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peerd.client.speculation.controller import Asking, Controller


@pytest.fixture(scope="package")
def path(tmp_path_factory, byte_tokenizer):
    """A random model of bytes, with its tokenizer."""
    folder = tmp_path_factory.mktemp("bytes")
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=257,
        max_position_embeddings=512,
        eos_token_id=256,
        bos_token_id=None,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def always_asked(monkeypatch):
    """Ask the draft model before every step but the first, and send all that it guesses."""
    monkeypatch.setattr(Controller, "ask", lambda self, free, share, token_s, room: Asking(min(6, room), 0.0))
    monkeypatch.setattr(Controller, "choose", lambda self, chances: [len(row) for row in chances])
    monkeypatch.setattr(Controller, "rate", lambda self, chances: len(chances))
