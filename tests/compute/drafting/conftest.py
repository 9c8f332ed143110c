"""The head of a tiny Llama."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from peerd.compute.families.lookup import family_named
from peerd.compute.model.head import Head
from tests.compute.tiny_families import tiny_config


@pytest.fixture(scope="package")
def head() -> Head:
    torch.manual_seed(0)
    family = family_named("llama")
    model = LlamaForCausalLM(tiny_config(family, {"num_hidden_layers": 0})).eval().requires_grad_(False)
    # Logits that differ: each embedding is its own token's row of the LM head.
    model.model.embed_tokens.weight.mul_(50)
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return Head(model, family)
