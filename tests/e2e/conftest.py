"""Real swarms of the real model on loopback, and local Transformers to compare them with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import peerd
from peerd.cli.demo import even_spans
from peerd.cli.processes import open_peer_processes
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.trio_tools import open_tasks

LISTEN = "/ip4/127.0.0.1/tcp/0/ws"
BLOCKS = 30
KV_TOKENS = 8192
# Where the reference's two best logits are closer than this, rounding may decide (DESIGN.md, "What is promised").
DECISIVE_MARGIN = 1e-3


@pytest.fixture(scope="session", autouse=True)
def _machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder for the tests, and one compute thread, because several servers share this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_path() -> Path:
    """SmolLM2-135M-Instruct."""
    return demo_model_path()


@dataclass(frozen=True)
class Answer:
    """The answer of Transformers' own `generate` to a prompt, with the margin of each token."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    margins: tuple[float, ...]

    @property
    def decisive(self) -> tuple[int, ...]:
        """The tokens up to the first that rounding may change."""
        close = [index for index, margin in enumerate(self.margins) if margin <= DECISIVE_MARGIN]
        return self.token_ids[: min(close, default=len(self.token_ids))]


class Reference:
    """Transformers on the same weights in fp32, greedy."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        self.model: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, **where)
        self._answers: dict[tuple[tuple[int, ...], int], Answer] = {}

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        if not chat:
            return list(self.tokenizer(prompt)["input_ids"])
        turn = [{"role": "user", "content": prompt}]
        return list(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"])

    def answer(self, prompt: Sequence[int], count: int) -> Answer:
        """At most `count` tokens; fewer if the model ends its answer."""
        key = (tuple(prompt), count)
        if key not in self._answers:
            ids = torch.tensor([list(prompt)])
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best = [logits[0].topk(2).values for logits in output.logits]
            new = tuple(output.sequences[0, len(prompt) :].tolist())
            self._answers[key] = Answer(key[0], new, tuple(float(two[0] - two[1]) for two in best))
        return self._answers[key]

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The logits of a whole row, `[n, vocabulary]`."""
        logits: torch.Tensor = self.model(torch.tensor([list(token_ids)])).logits[0]
        return logits

    @torch.inference_mode()
    def hidden_states(self, token_ids: Sequence[int]) -> list[torch.Tensor]:
        """The input of each block for a whole row, `[n, width]`."""
        states = self.model(torch.tensor([list(token_ids)]), output_hidden_states=True).hidden_states
        return [state[0] for state in states]


@pytest.fixture(scope="session")
def reference(model_path: Path) -> Reference:
    return Reference(model_path)


class LocalServer:
    """A serving peer in this process, which can be stopped separately."""

    def __init__(self, peer: peerd.Peer, scope: trio.CancelScope, stopped: trio.Event) -> None:
        self.peer = peer
        self._scope = scope
        self._stopped = stopped

    @property
    def engine(self) -> Any:
        return self.peer.served[0].task.engine

    async def stop(self) -> None:
        """Leave the swarm in good order."""
        self._scope.cancel()
        await self._stopped.wait()


class LocalSwarm:
    """Servers in this process, on real sockets."""

    def __init__(self, model_path: Path, tasks: trio.Nursery) -> None:
        self.servers: list[LocalServer] = []
        self._model_path = model_path
        self._tasks = tasks

    @property
    def bootstrap(self) -> tuple[peerd.Multiaddr, ...]:
        return self.servers[0].peer.addresses if self.servers else ()

    async def serve(self, span: peerd.Span, *, head: bool = False) -> LocalServer:
        server: LocalServer = await self._tasks.start(self._run, span, self.bootstrap, head)
        self.servers.append(server)
        return server

    async def _run(
        self,
        span: peerd.Span,
        bootstrap: Sequence[peerd.Multiaddr],
        head: bool,
        task_status: trio.TaskStatus[LocalServer],
    ) -> None:
        spec = peerd.ServeSpec(self._model_path, span, kv_tokens=KV_TOKENS, quantize="none", head=head)
        stopped = trio.Event()
        with trio.CancelScope() as scope:
            async with peerd.open_peer(listen=[LISTEN], serve=[spec], bootstrap=bootstrap) as peer:
                task_status.started(LocalServer(peer, scope, stopped))
                await trio.sleep_forever()
        stopped.set()

    @asynccontextmanager
    async def client(self, *, remote_head: bool = False) -> AsyncIterator[peerd.SwarmModel]:
        """The model, as a new client sees it."""
        async with (
            peerd.open_peer(bootstrap=self.bootstrap) as peer,
            peer.model(self._model_path, remote_head=remote_head) as model,
        ):
            yield model


OpenLocalSwarm = Callable[..., Any]


@pytest.fixture
def open_local_swarm(model_path: Path) -> OpenLocalSwarm:
    """`async with open_local_swarm(3) as swarm:` all blocks, spread evenly over that many servers."""

    @asynccontextmanager
    async def open_swarm(servers: int, *, head: bool = False) -> AsyncIterator[LocalSwarm]:
        async with open_tasks() as tasks:
            swarm = LocalSwarm(model_path, tasks)
            for span in even_spans(BLOCKS, servers):
                await swarm.serve(span, head=head)
            yield swarm

    return open_swarm


@pytest.fixture
def open_processes(model_path: Path) -> Callable[..., Any]:
    """`async with open_processes("0:15", "15:30") as (bootstrap, *servers):` each peer is a separate process."""

    @asynccontextmanager
    async def open_swarm(*spans: str) -> AsyncIterator[list[Any]]:
        async with open_peer_processes(threads=1) as processes:
            bootstrap = await processes.start()
            servers: list[Any] = [None] * len(spans)

            async def start(index: int) -> None:
                join = ("--bootstrap", str(bootstrap.address), "--quantize", "none")
                servers[index] = await processes.start(
                    "--serve-blocks", spans[index], "--model", str(model_path), "--kv-tokens", str(KV_TOKENS), *join
                )

            async with trio.open_nursery() as nursery:
                for index in range(len(spans)):
                    nursery.start_soon(start, index)
            yield [bootstrap, *servers]

    return open_swarm
