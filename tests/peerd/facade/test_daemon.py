"""A model over a daemon's socket behaves like a model over its own peer; many programs share the daemon's one peer."""

from __future__ import annotations

import copy
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import peerd
from peerd.api.serve import Endpoint, open_local_api
from peerd.facade.cache import RemoteCache
from peerd.protocol.errors import InvalidRequest
from tests.peerd.facade.conftest import Servers, make_byte_tokenizer
from tests.peerd.facade.test_generate import CASES, GREEDY, ONE, given, sequences, wait_until

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.slow,
    # peerd's web server asks by an old name of Python's.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # peft 0.21 asks Transformers by an old name, with local models too.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [32, 38, 46, 26, 43, 38, 32, 79]])
SAME = ("greedy, a left-padded batch", "beams of a batch, two returned", "prompt lookup", "guidance, a second cache")


@asynccontextmanager
async def open_daemon(path: Path, bootstrap: list[Any], socket: Path) -> AsyncIterator[peerd.Peer]:
    """Do the same as `peerd --client --model llama=PATH --socket SOCKET`."""
    async with (
        peerd.open_peer(bootstrap=bootstrap) as peer,
        peer.model(path) as model,
        open_local_api(peer, {"llama": model}, Endpoint(socket)),
    ):
        yield peer


class Daemon:
    """A daemon in this process, which can be stopped and started."""

    def __init__(self, servers: Servers, path: Path, socket: Path) -> None:
        self.socket = socket
        self._servers, self._path = servers, path
        self.start()

    def start(self) -> None:
        opening = open_daemon(self._path, self._servers.bootstrap, self.socket)
        _, self.stop = self._servers.bridge.hold(opening)


@pytest.fixture(scope="module")
def daemon(servers: Servers, llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    # A daemon also answers text, so its model needs a tokenizer.
    folder = tmp_path_factory.mktemp("daemon")
    shutil.copytree(llama_path, folder / "llama")
    make_byte_tokenizer().save_pretrained(folder / "llama")
    running = Daemon(servers, folder / "llama", folder / "peerd.sock")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def _opened(daemon: Daemon, llama_path: Path) -> Iterator[Any]:
    with peerd.RemoteModelForCausalLM.from_pretrained(llama_path, daemon=daemon.socket) as model:
        yield model


@pytest.mark.parametrize("case", SAME)
def test_generate_gives_the_tokens_of_the_local_model(case: str, local: Any, remote: Any) -> None:
    inputs, options = CASES[case]
    assert torch.equal(sequences(remote, inputs, **options), sequences(local, inputs, **options))


def test_a_chat_goes_on_over_one_cache_and_leaves_no_session(local: Any, remote: Any, servers: Servers) -> None:
    texts = []
    for model in (remote, local):
        cache, text = DynamicCache(), ONE["input_ids"]
        for turn in range(3):
            text = model.generate(
                text, attention_mask=torch.ones_like(text), **given(model, cache), max_new_tokens=6, **GREEDY
            )
            text = torch.cat((text, torch.tensor([[turn, 30, 31]])), 1)
        texts.append(text)
        if model is remote:
            assert isinstance(cache, RemoteCache)
            assert servers.sessions == 2
        del cache
    assert torch.equal(*texts)
    wait_until(lambda: servers.sessions == 0)


def test_lora_and_deep_prompts_have_the_gradients_of_the_local_model(
    daemon: Daemon, servers: Servers, llama_path: Path, local: Any
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    gradients = []
    options: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": 3}
    for where in ({"daemon": daemon.socket}, {"bootstrap": servers.bootstrap}):
        torch.manual_seed(1)
        with peerd.RemoteModelForCausalLM.from_pretrained(llama_path, **where, **options) as model:
            adapted = peft.get_peft_model(model, config)
            model.prompts.requires_grad_(True)
            model.prompts.deep.data.normal_(generator=torch.Generator().manual_seed(2))
            # B is zero at first, so A's gradient would be zero too.
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(generator=torch.Generator().manual_seed(3))
            adapted(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
            found = {name: each.grad for name, each in adapted.named_parameters() if each.requires_grad}
            assert len(found) == 2 * 2 * 8 + 2
            gradients.append(found)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_prefix_has_the_gradients_and_answers_that_it_has_over_a_peer_of_its_own(
    daemon: Daemon, servers: Servers, llama_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    gradients, answers = [], []
    for where in ({"daemon": daemon.socket}, {"bootstrap": servers.bootstrap}):
        torch.manual_seed(1)
        with peerd.RemoteModelForCausalLM.from_pretrained(llama_path, **where) as model:
            adapted = peft.get_peft_model(model, config)
            adapted(input_ids=IDS, labels=IDS).loss.backward()
            [leaf] = [each for each in adapted.parameters() if each.requires_grad]
            gradients.append(leaf.grad)
            answers.append(adapted.eval().generate(**ONE, max_new_tokens=6, **GREEDY))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)
    assert torch.equal(*answers)


def test_an_adapter_acts_in_sessions_too(remote: Any, local: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["v_proj"], init_lora_weights=False, use_rslora=True
    )
    answers = []
    for model in (copy.deepcopy(local), remote):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, config).eval()
        try:
            answers.append(adapted.generate(**ONE, max_new_tokens=8, **GREEDY))
        finally:
            adapted.unload()
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], sequences(local, ONE, max_new_tokens=8, **GREEDY))


def test_an_input_keeps_its_gradient_in_several_forwards(local: Any, remote: Any) -> None:
    gradients = []
    own = nn.Linear(64, 64)
    for model in (remote, local):
        leaf = model.get_input_embeddings()(IDS).detach().requires_grad_()
        losses = [model(inputs_embeds=own(leaf[row : row + 1]), use_cache=False).logits.mean() for row in (0, 1)]
        losses[0].backward()
        losses[1].backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_a_daemon_that_ends_is_said_and_the_cache_goes_on_with_its_successor(
    daemon: Daemon, local: Any, remote: Any
) -> None:
    def answer(model: Any, between: Callable[[], None]) -> torch.Tensor:
        cache = DynamicCache()
        with torch.no_grad():
            model(ONE["input_ids"], use_cache=True, **given(model, cache))
            between()
            return model(torch.tensor([[5, 6]]), use_cache=True, **given(model, cache)).logits

    def fail_once() -> None:
        daemon.stop()
        with pytest.raises(InvalidRequest, match=r"no peerd listens on .*peerd --client --model"):
            remote(ONE["input_ids"], use_cache=True)
        daemon.start()

    found = answer(remote, fail_once)
    torch.testing.assert_close(found, answer(local, lambda: None), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"daemon": "/nowhere/peerd.sock"}, r"no peerd listens on /nowhere/peerd.sock"),
        ({"daemon": True, "bootstrap": ["/ip4/127.0.0.1/tcp/1/ws"]}, "bootstrap: with daemon= the daemon knows"),
        ({"daemon": True, "swarm_key": b"k" * 32}, "swarm_key: with daemon="),
    ],
)
def test_a_daemon_that_is_not_there_and_options_of_its_own_are_refused(
    options: dict[str, Any], said: str, llama_path: Path
) -> None:
    with pytest.raises((InvalidRequest, ValueError), match=said):
        peerd.RemoteModelForCausalLM.from_pretrained(llama_path, **options)


def test_a_daemon_without_the_model_says_which_it_has(daemon: Daemon, llama_path: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_path, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(InvalidRequest, match=r"there is no model .* models: llama"):
        peerd.RemoteModelForCausalLM.from_pretrained(tmp_path / "other", daemon=daemon.socket)


def test_without_a_path_the_default_socket_is_asked(
    daemon: Daemon, llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(daemon.socket.parent))
    with peerd.AutoModelForCausalLM.from_pretrained(llama_path, daemon=True) as model:
        assert repr(model.swarm.blocks).endswith(f"{daemon.socket}>")
        assert sequences(model, ONE, max_new_tokens=2, **GREEDY).shape == (1, 9)
