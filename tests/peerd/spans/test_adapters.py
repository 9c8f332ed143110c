"""An operator's adapters: loaded, announced, changed while sessions run, and refused if they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import peerd
from peerd.cli.main import cli
from peerd.cli.options.parsing import parse_adapter
from peerd.compute.errors import AdapterError
from peerd.protocol.messages.adapters import name_of
from peerd.testing.network import MemoryNetwork

LISTEN = "/ip4/10.0.0.1/tcp/4000/ws"
HIDDEN, BLOCKS = 32, 4
SPAN = peerd.Span(1, 3)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4, vocab_size=64
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def write_adapter(tmp_path):
    """Call it with a name for the directory of an adapter; `width`, `blocks` and `digest` may be wrong."""

    def write(name, *, width=HIDDEN, blocks=range(BLOCKS), alpha=2, digest=""):
        folder = tmp_path / name
        folder.mkdir()
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": alpha, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        prefix = "base_model.model.model.layers"
        tensors = {
            f"{prefix}.{block}.self_attn.q_proj.lora_{side}.weight": torch.ones(shape) * len(name)
            for block in blocks
            for side, shape in (("A", (1, width)), ("B", (HIDDEN, 1)))
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"model_digest": digest})
        return folder

    return write


def serving(model_folder, *adapters, **settings):
    spec = peerd.ServeSpec(
        model_folder, SPAN, kv_tokens=256, throughput=100.0, adapters=tuple(adapters), memory_bytes=2**30, **settings
    )
    return peerd.open_peer(transport=MemoryNetwork().transport("10.0.0.1"), listen=[LISTEN], serve=[spec])


@pytest.mark.real_time
async def test_a_peer_announces_its_adapters_and_what_it_takes_and_changes_both_while_it_runs(
    model_folder, write_adapter
):
    poet = write_adapter("poet")
    async with serving(model_folder, ("poet", poet), ("bard", write_adapter("bard", alpha=3))) as peer:
        (record,) = peer._spans._slots.records()
        assert [name_of(adapter) for adapter in record.adapters] == ["bard", "poet"]
        assert record.client_adapters == 2**30 // 64
        (served,) = peer.served
        clerk = await peer.load_adapter(served, "clerk", write_adapter("clerk"))
        # Other weights under the same name are told apart, and the same are the same.
        assert clerk.startswith("clerk@")
        (record,) = peer._spans._slots.records()
        assert clerk in record.adapters
        with pytest.raises(AdapterError, match="there is an adapter called clerk already"):
            await peer.load_adapter(served, "clerk", poet)
        peer.unload_adapter(served, clerk)
        (record,) = peer._spans._slots.records()
        assert clerk not in record.adapters
        assert len(record.to_payload()) <= 896


@pytest.mark.real_time
async def test_more_adapters_than_an_announcement_holds_are_refused(model_folder, write_adapter):
    async with serving(model_folder, *((f"a{n}", write_adapter(f"a{n}")) for n in range(8))) as peer:
        (served,) = peer.served
        with pytest.raises(peerd.InvalidRequest, match="9 adapters do not fit the announcement of blocks 1:3"):
            await peer.load_adapter(served, "one-more", write_adapter("one-more"))
        assert len(served.task.adapters) == 8
        # Room was not lost by it.
        peer.unload_adapter(served, min(served.task.adapters))
        await peer.load_adapter(served, "another", write_adapter("another"))
        assert len(served.task.adapters) == 8


@pytest.mark.real_time
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"width": HIDDEN + 1}, "block 1: self_attn.q_proj maps 32 to 32 values"),
        ({"blocks": [0, 1, 3]}, "names self_attn.q_proj of block 2 as adapted, and has no weights for it"),
    ],
)
async def test_an_adapter_of_another_model_or_with_missing_blocks_is_refused_at_start(
    model_folder, write_adapter, settings, reason
):
    with pytest.raises(AdapterError, match=reason):
        async with serving(model_folder, ("poet", write_adapter("poet", **settings))):
            pass


@pytest.mark.real_time
async def test_an_adapter_that_was_trained_for_another_model_is_served_only_where_the_operator_says_so(
    model_folder, write_adapter
):
    foreign = write_adapter("foreign", digest="ab" * 32)
    refused = r"foreign was trained for another model, .* \(digest abababababababab, this one has .*--any-base"
    with pytest.raises(AdapterError, match=refused):
        async with serving(model_folder, ("foreign", foreign)):
            pass
    async with serving(model_folder) as peer:
        (served,) = peer.served
        with pytest.raises(AdapterError, match=refused):
            await peer.load_adapter(served, "foreign", foreign)
        await peer.load_adapter(served, "ours", write_adapter("ours", digest=served.model.hex()))
    async with serving(model_folder, ("foreign", foreign), any_base=True) as peer:
        (served,) = peer.served
        await peer.load_adapter(served, "more", foreign)
        assert [name_of(adapter) for adapter in sorted(served.task.adapters)] == ["foreign", "more"]


@pytest.mark.real_time
async def test_no_adapters_of_clients_are_taken_where_the_operator_says_so(model_folder):
    async with serving(model_folder, client_adapter_bytes=0) as peer:
        (record,) = peer._spans._slots.records()
        assert record.client_adapters == 0
        assert "client_adapters" not in record.to_header()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--adapter", "poet"], "'poet' is neither NAME=DIR, NAME=org/name nor org/name"),
        (["--adapter", "a b=dir"], "not an adapter's name"),
        (["--adapter", "poet="], "'poet=' has nothing after the ="),
        (["--adapter", "org/a@b@c"], "is no revision"),
        (["--client-adapters", "some"], "a size is written such as"),
        (["--listen", LISTEN, "--adapter", "poet=dir"], "add --serve-blocks"),
    ],
)
def test_mistakes_in_options_are_said(arguments, reason):
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert reason in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("poet=./poet", "poet", Path("poet")),
        ("poet=/adapters/poet", "poet", Path("/adapters/poet")),
        ("poet=org/rhymes", "poet", "org/rhymes"),
        ("org/rhymes", "rhymes", "org/rhymes"),
        ("org/rhymes@v2", "rhymes", "org/rhymes@v2"),
        ("poet=here/poet", "poet", Path("here/poet")),
    ],
)
def test_an_adapter_is_a_directory_or_on_the_hub_and_what_is_here_comes_first(
    text, name, source, tmp_path, monkeypatch
):
    (tmp_path / "here/poet").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_adapter(text) == (name, source)
