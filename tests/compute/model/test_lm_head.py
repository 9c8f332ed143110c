"""The LM head of a half-precision model gives fp32 logits, in little memory beside its weights."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from peerd.compute.model.lm_head import SLICE_BYTES, LmHead


def linear(vocabulary: int, width: int, dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    made = nn.Linear(width, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_the_fp32_product_of_the_stored_weights(dtype: torch.dtype, bias: bool) -> None:
    width = 512
    # Two whole slices and a part of one.
    layer = linear(SLICE_BYTES // (4 * width) * 2 + 7, width, dtype, bias=bias)
    hidden = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = nn.functional.linear(hidden.double(), layer.weight.double(), layer.bias.double() if bias else None)
    logits = LmHead(layer)(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, atol=1e-4, rtol=1e-6)
    rounded = (layer(hidden).double() - exact).abs().max()
    assert (logits.double() - exact).abs().max() < rounded / 100, "Transformers' own product rounds to 8 or 11 bits"


def test_several_threads_give_the_same_logits_and_leave_torch_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerd.compute.model.lm_head._WORTH_THREADS_BYTES", 0)
    head = LmHead(linear(1003, 64, torch.bfloat16))
    hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(head(hidden))
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_fp32_weights_give_what_the_layer_itself_gives() -> None:
    layer = linear(50, 16, torch.float32, bias=True)
    hidden = torch.randn(4, 16)
    assert torch.equal(LmHead(layer)(hidden), layer(hidden))


def test_a_large_head_takes_no_memory_beside_its_weights_and_logits() -> None:
    script = """
import resource, torch
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM
from peerd.compute.families.meta_build import build_on_meta, compute_buffers
from peerd.compute.families.lookup import family_named
from peerd.compute.model.head import Head
torch.set_num_threads(1)

def made(vocabulary, width):
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1, tie_word_embeddings=False)
    model = build_on_meta(LlamaForCausalLM, config, torch.bfloat16)
    model.model.layers = torch.nn.ModuleList()
    model.to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(0.5)
    compute_buffers(model, model.config, torch.device("cpu"))
    return Head(model, family_named("llama"))

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
made(64, 64).logits(torch.ones(8, 64))
head, hidden = made(131072, 1024), torch.ones(8, 1024)
before = peak()
logits = head.logits(hidden)
assert (logits == 256).all()
print(peak() - before, head.model.lm_head.weight.nbytes / 2**20, logits.nbytes / 2**20)
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    grown_mib, weight_mib, logits_mib = map(float, output.split())
    assert (weight_mib, logits_mib) == (256, 4)
    assert grown_mib < 2 * logits_mib + 32, "an fp32 copy of the weights would take 512 MiB"
