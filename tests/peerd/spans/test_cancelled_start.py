"""A start that is cancelled while its blocks are loaded, which nothing can interrupt."""

import pytest
import torch
import trio

import peerd
from peerd.spans import loading
from peerd.testing.network import MemoryNetwork

LISTEN = "/ip4/10.0.0.1/tcp/4000/ws"


@pytest.fixture
def model_folder(tmp_path):
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.real_time
async def test_a_peer_that_is_stopped_while_it_loads_just_stops(model_folder, monkeypatch):
    """The parts of a peer end in any order, so what was loaded may find its server gone."""
    load = loading.load
    loaded = []

    def stopped_meanwhile(*arguments):
        trio.from_thread.run_sync(stop.cancel)
        trio.from_thread.run_sync(lambda: None)
        loaded.append(load(*arguments))
        return loaded[0]

    monkeypatch.setattr(loading, "load", stopped_meanwhile)
    spec = peerd.ServeSpec(model_folder, peerd.Span(0, 2), kv_tokens=256, throughput=100.0)
    with trio.CancelScope() as stop:
        async with peerd.open_peer(transport=MemoryNetwork().transport("10.0.0.1"), listen=[LISTEN], serve=[spec]):
            pytest.fail("it was stopped before it was open")
    assert stop.cancelled_caught
    assert loaded
