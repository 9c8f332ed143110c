"""A swarm of a model that is only on a hub: which peer fetches what, how a download is stopped, and the answer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from huggingface_hub import constants

import peerd
from peerd.cli.processes import open_peer_processes
from tests.fakes.hub.server import SEND_BYTES, Fault, HubServer, open_hub

pytestmark = [pytest.mark.real_time, pytest.mark.processes]

REPO = "tiny-org/tiny-llama"
LISTEN = "/ip4/127.0.0.1/tcp/0/ws"
BLOCKS = 4
PROMPT = "a b c d"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of words; each block in a shard of its own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(3)
    config = LlamaConfig(
        num_hidden_layers=BLOCKS,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
        eos_token_id=63,
        bos_token_id=62,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, max_shard_size="40KB")
    words = {chr(97 + number // 26) + chr(97 + number % 26): number + 26 for number in range(38)}
    backend: Any = Tokenizer(WordLevel({chr(97 + n): n for n in range(26)} | words, unk_token="a"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a").save_pretrained(folder)
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub that holds it, as the environment of every process that is started names it."""
    with open_hub() as server:
        server.push(REPO, model)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        # Who waits for data that do not come waits for longer than a test may take.
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "600")
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 600)
        for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield server


def shards_of(folder: Path, *prefixes: str) -> set[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {shard for name, shard in index.items() if name.startswith(prefixes)}


def fetched(hub: HubServer) -> set[str]:
    return {name for name, count in hub.served.items() if count and name.endswith(".safetensors")}


def expected_ids(model: Path, count: int) -> list[int]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(PROMPT)["input_ids"]])
    output = whole.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return output[0, ids.shape[1] :].tolist()


async def test_servers_and_a_client_fetch_their_own_shards_and_answer_as_transformers_does(hub, model, tmp_path):
    async with open_peer_processes(threads=1) as processes:
        arguments = ["--model", REPO, "--disk", "1GB", "--kv-tokens", "256"]
        first = await processes.start("--serve-blocks", "0:2", *arguments)
        assert fetched(hub) == shards_of(model, "model.layers.0.", "model.layers.1.")
        join = ("--bootstrap", str(first.address))
        await processes.start("--serve-blocks", "2:4", *arguments, *join)
        blocks = fetched(hub)
        assert blocks == shards_of(model, "model.layers.")
        ask = ["--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "8"]
        # On a machine of its own: with a cache of its own.
        done = await trio.run_process(
            [sys.executable, "-m", "peerd", "generate", REPO, "--revision", "main", *join, *ask, "--json"],
            capture_stdout=True,
            env=processes._environment | {"HF_HOME": str(tmp_path / "hf2"), "XDG_CACHE_HOME": str(tmp_path / "cache2")},
        )
    head = shards_of(model, "model.embed_tokens.", "model.norm.", "lm_head.")
    snapshot = {path.name for path in (tmp_path / "hf2").glob("hub/*/snapshots/*/*.safetensors")}
    assert snapshot == head
    assert snapshot < shards_of(model, "")
    assert json.loads(done.stdout)["token_ids"] == expected_ids(model, 8)
    for name in head & blocks:
        assert hub.served[name] == 2 * (model / name).stat().st_size, "once a machine"


async def test_auto_serves_what_is_on_disk_where_all_blocks_are_equally_wanted(hub, model, tmp_path):
    settings = peerd.HubSettings(endpoint=hub.url, cache_dir=tmp_path / "hf")
    spec = peerd.ServeSpec(REPO, peerd.Span(2, 4), kv_tokens=256)
    async with peerd.open_peer(listen=[LISTEN], serve=[spec], hub=settings):
        pass
    before = fetched(hub)
    spec = peerd.ServeSpec(REPO, 2, kv_tokens=256, revision="main")
    async with peerd.open_peer(listen=[LISTEN], serve=[spec], hub=settings) as server:
        assert [served.span for served in server.served] == [peerd.Span(2, 4)]
        assert fetched(hub) == before
        async with peerd.open_peer(hub=settings) as client, client.model(REPO, revision="main") as remote:
            assert remote.facts.digest == server.served[0].model


@pytest.mark.parametrize("stalls", [False, True], ids=["flowing", "stalled"])
async def test_cancelling_a_download_waits_for_no_data_and_loses_nothing(hub, model, tmp_path, stalls):
    settings = peerd.HubSettings(endpoint=hub.url, cache_dir=tmp_path / "hf")
    go_on = threading.Event()
    (name,) = shards_of(model, "model.layers.3.mlp.down")
    hub.fail(name, Fault(cut_after=2 * SEND_BYTES, wait_for=go_on))
    spec = peerd.ServeSpec(REPO, peerd.Span(3, 4), kv_tokens=256)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel():
                await trio.to_thread.run_sync(hub.wait_until_served, name, 2 * SEND_BYTES)
                if not stalls:
                    go_on.set()
                scope.cancel()

            nursery.start_soon(cancel)
            async with peerd.open_peer(listen=[LISTEN], serve=[spec], hub=settings):
                pytest.fail("it was to be cancelled while it fetches")
    assert scope.cancelled_caught
    go_on.set()
    async with peerd.open_peer(listen=[LISTEN], serve=[spec], hub=settings) as server:
        assert [served.span for served in server.served] == [peerd.Span(3, 4)]
    starts = [start for file, start in hub.answers if file == name]
    # What was on its way when it was cancelled may be all that was missing.
    assert all(start >= 2 * SEND_BYTES for start in starts[1:]), "it goes on where it was"


def test_ctrl_c_while_a_daemon_fetches_ends_it_before_data_come_and_says_nothing_wrong(hub, model, tmp_path):
    go_on = threading.Event()
    (name,) = shards_of(model, "model.layers.3.mlp.down")
    hub.fail(name, Fault(cut_after=2 * SEND_BYTES, wait_for=go_on))
    command = [sys.executable, "-m", "peerd", "--serve-blocks", "3:4", "--model", REPO, "--listen", LISTEN]
    process = subprocess.Popen(
        [*command, "--identity", str(tmp_path / "key")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    hub.wait_until_served(name, 2 * SEND_BYTES, 60)
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        go_on.set()
    assert process.returncode == 130
    assert out == ""
    assert f"{REPO} is commit" in err
    assert "Traceback" not in err


def test_a_model_that_is_not_there_is_one_line_and_exit_code_2(hub):
    command = [sys.executable, "-m", "peerd", "generate", "nobody/nothing", "--prompt", "x", "--bootstrap"]
    address = "/ip4/127.0.0.1/tcp/9/ws/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
    done = subprocess.run([*command, address], capture_output=True, text=True)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "WARNING" not in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"Error: {hub.url} has no model nobody/nothing")
