"""A swarm in this process, on loopback, for programs without Trio, as users of Transformers see it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

import peerd
from peerd.facade import bridge
from peerd.facade.bridge import Bridge
from tests.fakes.hub.server import HubServer, open_hub

LISTEN = "/ip4/127.0.0.1/tcp/0/ws"


class Servers:
    """Peers that serve spans of one model, in a Trio loop of their own."""

    def __init__(self) -> None:
        # A bug ends a server under PEERD_STRICT=1, and only the log of the test that ran then would say so.
        self._crashes: list[logging.LogRecord] = []
        self.bridge = Bridge()
        self._noting = logging.Handler(logging.ERROR)
        # Other bridges log here too, some of them what a test lets fail.
        self._noting.addFilter(lambda record: record.thread == self.bridge._thread.ident)
        self._noting.emit = self._crashes.append  # type: ignore[method-assign]
        logging.getLogger(bridge.__name__).addHandler(self._noting)
        self.peers: list[peerd.Peer] = []
        self._closes: list[Any] = []

    def serve(self, path: Path, *spans: tuple[int, int], **settings: Any) -> None:
        """Start a peer for each span. They open in parallel behind the first, because a peer waits for answers while it
        opens. `settings`: more of `ServeSpec`.
        """
        waiting = list(spans)
        if not self.peers and waiting:
            self._open(path, [waiting.pop(0)], settings)
        self._open(path, waiting, settings)

    def _open(self, path: Path, spans: list[tuple[int, int]], settings: dict[str, Any]) -> None:
        def open_one(span: tuple[int, int]) -> tuple[peerd.Peer, Any]:
            spec = peerd.ServeSpec(path, peerd.Span(*span), kv_tokens=8192, throughput=1000.0, stay=True, **settings)
            return self.bridge.hold(peerd.open_peer(listen=[LISTEN], serve=[spec], bootstrap=self.bootstrap))

        with ThreadPoolExecutor(max_workers=8) as threads:
            for peer, close in threads.map(open_one, spans):
                self.peers.append(peer)
                self._closes.append(close)

    @property
    def bootstrap(self) -> list[peerd.Multiaddr]:
        return list(self.peers[0].addresses) if self.peers else []

    @property
    def sessions(self) -> int:
        return sum(peer.server.sessions for peer in self.peers if peer.server is not None)

    def check_answers(self) -> None:
        """Fail if a server has crashed, or unless the servers' loop turns and their port takes connections."""
        crashes = [logging.Formatter().format(record) for record in self._crashes]
        assert not crashes, "\n".join(crashes)

        async def connect() -> None:
            with trio.fail_after(10):
                stream = await trio.open_tcp_stream(str(self.bootstrap[0].host), self.bootstrap[0].port)
                await stream.aclose()

        self.bridge.call(connect)

    def kill(self, index: int) -> peerd.Peer:
        """End a peer at once, so that its connections break. Returns it."""
        self._closes.pop(index)()
        return self.peers.pop(index)

    def kill_one_of(self, chain: tuple[peerd.ServedBy, ...], hop: int) -> peerd.Peer:
        """End the peer that serves a hop of a chain. Returns it."""
        ids = [peer.peer_id for peer in self.peers]
        return self.kill(ids.index(chain[hop].peer))

    def close(self) -> None:
        for close in reversed(self._closes):
            close()
        self.bridge.close()
        logging.getLogger(bridge.__name__).removeHandler(self._noting)


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight random blocks, with logits far enough apart that rounding decides no token."""
    torch.manual_seed(3)
    config = LlamaConfig(
        num_hidden_layers=8,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=260,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=256,
        pad_token_id=257,
        bos_token_id=258,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.12 if parameter.ndim > 1 else 0.05))
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def servers(llama_path: Path) -> Iterator[Servers]:
    serving = Servers()
    serving.serve(llama_path, (0, 3), (3, 8))
    yield serving
    serving.close()


@pytest.fixture(scope="session")
def _opened(servers: Servers, llama_path: Path) -> Iterator[Any]:
    with peerd.RemoteModelForCausalLM.from_pretrained(llama_path, bootstrap=servers.bootstrap) as model:
        yield model


@pytest.fixture
def remote(_opened: Any) -> Any:
    """The model whose blocks are on servers, as `from_pretrained` returned it."""
    _opened.eval()
    return _opened


@pytest.fixture(scope="session")
def local(llama_path: Path) -> Any:
    """The same model, whole, in Transformers."""
    return LlamaForCausalLM.from_pretrained(llama_path).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def hub(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A hub that holds the Llama as `org/name`, and takes uploads, as the environment names it."""
    with open_hub() as server, pytest.MonkeyPatch.context() as patch:
        server.push("org/name", llama_path)
        patch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        # The fake hub speaks LFS, which is what huggingface_hub speaks without its extension.
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", "hf_good")
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield server


@pytest.fixture
def byte_tokenizer() -> Any:
    """A tokenizer of the test's own."""
    return make_byte_tokenizer()


def make_byte_tokenizer() -> Any:
    """Each byte is a token; `<eos>`, `<pad>` and `<bos>` are numbered as the Llama's configuration says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<pad>", "<bos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>", padding_side="left"
    )
