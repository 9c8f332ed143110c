"""Servers die beneath a Transformers program, which still gets the same tokens and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import LogitsProcessor, LogitsProcessorList

import peerd
from peerd.client.training.training_pass import Pass
from tests.peerd.facade.conftest import Servers
from tests.peerd.facade.test_scripts import LIMIT_S, PREAMBLE

pytestmark = [pytest.mark.real_time, pytest.mark.slow]

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [32, 38, 46, 26, 43, 38, 32, 79]])


#: The first serves nothing that is used: the others join through it.
SPANS = [(0, 1), (0, 3), (3, 8), (0, 3), (3, 8)]


@pytest.fixture(scope="module")
def _serving() -> Iterator[Servers]:
    serving = Servers()
    yield serving
    serving.close()


@pytest.fixture
def servers(_serving: Servers, llama_path: Path) -> Servers:
    """Two chains of two servers. Those that earlier tests killed are replaced."""
    missing = list(SPANS)
    for peer in _serving.peers:
        span = peer.served[0].span
        missing.remove((span.start, span.end))
    _serving.serve(llama_path, *missing)
    return _serving


@pytest.fixture
def remote(servers: Servers, llama_path: Path) -> Iterator[Any]:
    with peerd.RemoteModelForCausalLM.from_pretrained(llama_path, bootstrap=servers.bootstrap) as model:
        yield model


class KillAt(LogitsProcessor):  # type: ignore[misc]
    """Lets servers die between two tokens: `victims[n]` is the hop that dies before token n + 1."""

    def __init__(self, model: Any, servers: Servers, victims: dict[int, int]) -> None:
        self.session: Any = None
        self._model, self._servers, self._victims = model, servers, victims
        start = model.swarm.blocks.start_session

        async def remember(**options: Any) -> Any:
            self.session = await start(**options)
            return self.session

        model.swarm.blocks.start_session = remember
        self._tokens = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._tokens += 1
        if (hop := self._victims.get(self._tokens)) is not None:
            self._servers.kill_one_of(self.session.chain, hop)
        return scores


def test_beams_go_on_when_both_servers_of_their_chain_die(local: Any, remote: Any, servers: Servers) -> None:
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 16, "num_beams": 3, "do_sample": False}
    killer = KillAt(remote, servers, {4: 1, 10: 0})
    found = remote.generate(IDS, logits_processor=LogitsProcessorList([killer]), **options)
    assert torch.equal(found, local.generate(IDS, **options))
    assert killer.session.failovers == 2


def first_dies(servers: Servers, span: peerd.Span, turn: int) -> None:
    """Of the peers that serve `span`, let the one that is asked die in the middle of its `turn`th turn of training."""
    twins = [peer for peer in servers.peers if peer.served[0].span == span]
    died = False

    def strike(peer: peerd.Peer) -> None:
        task: Any = peer.served[0].task
        work, seen = task.run_work, 0

        async def struck(*args: Any) -> None:
            nonlocal died, seen
            seen += 1
            if died or seen < turn:
                await work(*args)
                return
            died = True
            # `kill` waits for the peer's end, which would block the loop in which the peer runs.
            threading.Thread(target=lambda: servers.kill(servers.peers.index(peer))).start()
            await trio.sleep_forever()

        task.run_work = struck

    for peer in twins:
        strike(peer)


@pytest.mark.parametrize("when", ["in the forward", "before the backward", "in the backward"])
def test_gradients_are_exact_when_a_server_dies(when: str, local: Any, remote: Any, servers: Servers) -> None:
    passes: list[Pass] = []
    forward = remote.swarm.blocks.forward

    async def remember(*args: Any, **options: Any) -> Pass:
        passes.append(await forward(*args, **options))
        return passes[-1]

    remote.swarm.blocks.forward = remember
    if when != "before the backward":
        first_dies(servers, peerd.Span(3, 8), turn=1 if when == "in the forward" else 2)
    gradients = []
    for model in (local, remote):
        leaf = model.get_input_embeddings()(IDS).detach().requires_grad_()
        loss = model(inputs_embeds=leaf, labels=IDS, use_cache=False).loss
        if model is remote and when == "before the backward":
            servers.kill_one_of(passes[0].chain, 1)
        loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)
    assert passes[0].failovers == 1
    assert len(servers.peers) == len(SPANS) - 1


#: A user's program in a process of its own. It prints the peer whose server is to die next, and waits until it is dead.
SCRIPT = """
from transformers import LogitsProcessor, LogitsProcessorList

local, blocks, used = LlamaForCausalLM.from_pretrained(PATH), model.swarm.blocks, []

def noted(call):
    async def ask(*args, **options):
        made = await call(*args, **options)
        used.append(made)
        return made
    return ask

blocks.start_session, blocks.forward = noted(blocks.start_session), noted(blocks.forward)

def let_die(hop):
    print(used[-1].chain[hop].peer, flush=True)
    sys.stdin.readline()

class DieAtTheThirdToken(LogitsProcessor):
    def __call__(self, ids, scores):
        if ids.shape[1] == IDS.shape[1] + 2:
            let_die(1)
        return scores

found = model.generate(
    IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False,
    logits_processor=LogitsProcessorList([DieAtTheThirdToken()]),
)
print(torch.equal(found, answer(local, 8)), flush=True)

gradients = []
for each in (local, model):
    leaf = each.get_input_embeddings()(IDS).detach().requires_grad_()
    for turn in range(2):
        loss = each(inputs_embeds=leaf, labels=IDS, use_cache=False).loss
        if each is model and turn == 0:
            let_die(0)
        loss.backward()
    gradients.append(leaf.grad)
print(torch.allclose(*gradients, rtol=1e-4, atol=1e-6), flush=True)
"""


@pytest.mark.processes
def test_a_script_goes_on_exactly_when_servers_die_beneath_it(servers: Servers, llama_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PREAMBLE + SCRIPT, str(llama_path), str(servers.bootstrap[0])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    said, died = [], []
    with subprocess.Popen(command, env=env, **pipes) as process:  # type: ignore[call-overload]
        late = threading.Timer(LIMIT_S, process.kill)
        late.start()
        try:
            for line in process.stdout:
                victim = next((peer for peer in servers.peers if str(peer.peer_id) == line.strip()), None)
                if victim is None:
                    said.append(line.strip())
                    continue
                died.append(servers.kill(servers.peers.index(victim)).served[0].span)
                process.stdin.write("it is dead\n")
                process.stdin.flush()
            errors = process.stderr.read()
        finally:
            late.cancel()
            process.kill()
    assert (said, died) == (["True", "True"], [peerd.Span(3, 8), peerd.Span(0, 3)]), errors
