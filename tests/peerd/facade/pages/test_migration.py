"""Each row of the page for users of Petals is run: the page's tables are this test's list."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

import peerd
from peerd.compute.adapters.lora import PROMPT, LoraPair
from tests.peerd.facade.conftest import Servers, make_byte_tokenizer
from tests.peerd.facade.test_generate import given

PAGE = Path(__file__).parents[4] / "docs/from-petals.md"
IDS = torch.tensor([[3, 14, 15, 92, 65]])
GREEDY = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}

pytestmark = [
    pytest.mark.real_time,
    # peft 0.21 calls Transformers by an old name, with local models too.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


class World:
    """A swarm, its model as Transformers', and the same in the async library."""

    def __init__(self, servers: Servers, path: Path, local: Any, remote: Any, library: peerd.SwarmModel) -> None:
        self.servers, self.path, self.local, self.remote, self.library = servers, path, local, remote, library
        self.hidden = local.get_input_embeddings()(IDS)[0].detach()
        with torch.no_grad():
            # The last hidden state is normed.
            self.states = local(IDS, output_hidden_states=True).hidden_states
            self.answer = local.generate(IDS, **GREEDY)

    def open(self, kind: Any = peerd.RemoteModelForCausalLM, **options: Any) -> Any:
        return kind.from_pretrained(self.path, bootstrap=self.servers.bootstrap, **options)

    def call(self, run: Callable[[], Any]) -> Any:
        return self.servers.bridge.call(run)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.local.model.norm(hidden)
        return normed


@pytest.fixture(scope="module")
def world(servers: Servers, llama_path: Path, local: Any, _opened: Any, tmp_path_factory: Any) -> Iterator[World]:
    # The library also answers text, so its model needs a tokenizer.
    folder = tmp_path_factory.mktemp("library") / "llama"
    shutil.copytree(llama_path, folder)
    make_byte_tokenizer().save_pretrained(folder)
    peer, close_peer = servers.bridge.hold(peerd.open_peer(bootstrap=servers.bootstrap))
    library, close_library = servers.bridge.hold(peer.model(folder))
    yield World(servers, folder, local, _opened.eval(), library)
    close_library()
    close_peer()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def causal(world: World) -> None:
    with world.open(peerd.AutoModelForCausalLM) as model:
        assert isinstance(model, LlamaForCausalLM)
        assert torch.equal(model.generate(IDS, **GREEDY), world.answer)


def bare(world: World) -> None:
    with world.open(peerd.RemoteModel) as model, torch.no_grad():
        close(model(IDS).last_hidden_state, world.local.model(IDS).last_hidden_state)


def classifier(world: World) -> None:
    with world.open(peerd.RemoteModelForSequenceClassification, num_labels=3) as model:
        model.config.pad_token_id = 257
        assert model(IDS).logits.shape == (1, 3)
        assert [name for name, each in model.named_parameters() if each.requires_grad] == ["score.weight"]


def head_dtype(world: World) -> None:
    with world.open(dtype=torch.bfloat16) as model:
        assert model(IDS).logits.dtype is torch.bfloat16


def blocked(world: World) -> None:
    last = world.servers.peers[1].peer_id
    with world.open(rules=peerd.ChainRules(blocked=frozenset({last}))) as model, pytest.raises(peerd.NoChain):
        model(IDS)
    with world.open(rules=peerd.ChainRules(allowed=frozenset(peer.peer_id for peer in world.servers.peers))) as model:
        assert torch.equal(model.generate(IDS, **GREEDY), world.answer)


def patience(world: World) -> None:
    async def run() -> torch.Tensor:
        async with world.library.session(max_length=8, patience=peerd.Patience()) as session:
            return await session.step(world.hidden, want="all")

    close(world.normed(world.call(run)), world.states[-1][0])


def route(world: World) -> None:
    async def run() -> list[peerd.Span]:
        generation = world.library.generate(IDS[0].tolist(), temperature=0, max_new_tokens=2)
        async for _ in generation:
            pass
        return [hop.span for hop in generation.chain]

    assert world.call(run) == [peerd.Span(0, 3), peerd.Span(3, 8)]


def own_adapter(world: World) -> None:
    pair = LoraPair(torch.ones(1, 64), torch.ones(64, 1), 0.1)

    async def run() -> tuple[torch.Tensor, torch.Tensor]:
        outputs = []
        for adapter in (peerd.LoraAdapter({(2, "self_attn.q_proj"): pair}), None):
            async with world.library.session(max_length=8, adapter=adapter) as session:
                outputs.append(await session.step(world.hidden, want="all"))
        return outputs[0], outputs[1]

    adapted, plain = world.call(run)
    assert (adapted - plain).abs().max() > 1e-3


def one_cache(world: World) -> None:
    cache = DynamicCache(config=world.remote.config)
    first = world.remote.generate(IDS, **GREEDY, **given(world.remote, cache))
    assert torch.equal(first, world.answer)
    options = GREEDY | {"attention_mask": torch.ones_like(first)}
    expected = world.local.generate(first, **options)
    assert torch.equal(world.remote.generate(first, **options, **given(world.remote, cache)), expected)


def going_back(world: World) -> None:
    async def run() -> torch.Tensor:
        async with world.library.session(max_length=8, max_rollback=4) as session:
            await session.step(world.hidden)
            return await session.step(world.hidden[3:], start=3, want="all")

    close(world.normed(world.call(run)), world.states[-1][0, 3:])


def assisted(world: World) -> None:
    assert torch.equal(world.remote.generate(IDS, assistant_model=world.local, **GREEDY), world.answer)


def configuration(world: World) -> None:
    assert type(world.remote.config) is type(world.local.config)
    assert world.remote.config.hidden_size == 64


def goes_on_from_the_whole_text(world: World) -> None:
    cache, opened = DynamicCache(config=world.remote.config), world.remote.swarm.sessions_opened
    text, new_ids = IDS, torch.tensor([[7, 8]])
    for _ in range(2):
        text = world.remote.generate(
            text, **GREEDY | {"attention_mask": torch.ones_like(text)}, **given(world.remote, cache)
        )
        text = torch.cat((text, new_ids), 1)
    # The second answer is longer than the session that was opened for the first.
    assert world.remote.swarm.sessions_opened - opened <= 2
    expected = torch.cat((world.answer, new_ids), 1)
    expected = world.local.generate(expected, **GREEDY | {"attention_mask": torch.ones_like(expected)})
    assert torch.equal(text[:, :-2], expected)


def one_block(world: World) -> None:
    with torch.no_grad():
        close(world.remote.model.layers[3](world.states[3]), world.states[4])


def without_a_head(world: World) -> None:
    async def run() -> torch.Tensor:
        done = await world.library.forward(world.states[3], blocks=peerd.Span(3, 7), keep=False)
        return done.output.view_as(world.states[7])

    close(world.call(run), world.states[7])


def layers(world: World) -> None:
    assert len(world.remote.model.layers) == 8


def slices(world: World) -> None:
    with torch.no_grad():
        close(world.remote.model.layers[3:7](world.states[3]), world.states[7])


def forks(world: World) -> None:
    async def run() -> torch.Tensor:
        async with world.library.session(max_length=8, max_rows=2) as session:
            await session.step(world.hidden[:4])
            ops = [peerd.Fork(0, 1, 4), peerd.Drop(0)]
            return await session.step(world.hidden[4:], row=1, start=4, ops=ops, want="all")

    close(world.normed(world.call(run)), world.states[-1][0, 4:])


def session_prompts(world: World) -> None:
    values = torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(0))
    prompts = peerd.LoraAdapter({(block, PROMPT): peerd.DeepPrompt(each) for block, each in enumerate(values)})

    async def run() -> tuple[torch.Tensor, torch.Tensor]:
        async with world.library.session(max_length=8, adapter=prompts) as session:
            stepped = await session.step(world.hidden, want="all")
        passed = await world.library.forward(world.hidden[None], prompts=values[:, None], keep=False)
        return stepped, passed.output[0]

    close(*world.call(run))


def tuning(world: World) -> None:
    for mode in ("ptune", "deep_ptune"):
        with world.open(tuning_mode=mode, pre_seq_len=16) as model:
            model(input_ids=IDS, labels=IDS).loss.backward()
            assert model.prompts.prefix.shape == (16, 64)
            assert model.prompts.prefix.grad.abs().max() > 0
            assert (model.prompts.deep is None) is (mode == "ptune")


def own_module(world: World) -> None:
    own = nn.Linear(64, 64)
    blocks = world.remote.model.layers
    blocks[3:](own(blocks[:3](world.hidden[None]))).mean().backward()
    assert own.weight.grad.abs().max() > 0


def lora(world: World) -> None:
    peft = pytest.importorskip("peft")
    with world.open() as model:
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        assert sum(each.grad is not None for each in adapted.parameters()) == 16


ROWS: dict[str, Callable[[World], None]] = {
    "`AutoDistributedModelForCausalLM`": causal,
    "`AutoDistributedModel`": bare,
    "`AutoDistributedModelForSequenceClassification`": classifier,
    "`DistributedLlamaForCausalLM` and the like": causal,
    "`AutoDistributedSpeculativeModel`": assisted,
    "`AutoDistributedConfig`": configuration,
    "`initial_peers=[...]`": causal,
    "`dht_prefix=`": causal,
    "`torch_dtype=`": head_dtype,
    "`allowed_servers=`, `blocked_servers=`": blocked,
    "`max_retries=`": patience,
    "`show_route=`": route,
    '`active_adapter="org/name"`': own_adapter,
    "`model.generate(...)`": causal,
    "`with model.inference_session(max_length=512):`": one_cache,
    "`model.generate(..., session=session)`": one_cache,
    "`with model.use_session(session):`, `model.active_session`": one_cache,
    "`model.generate(new_ids)` and `session.output_ids` in a session": goes_on_from_the_whole_text,
    "`session.position = n`": going_back,
    "`model.transformer.h`, `model.model.layers`": layers,
    "`model.model.layers[3:7](hidden)`": slices,
    "`model.model.layers[3](hidden)`, `RemoteTransformerBlock`": one_block,
    "`RemoteSequential(config, ...)` without a model's head": without_a_head,
    "`model.model.layers.inference_session(max_length=512)`": going_back,
    "`session.step(hidden, hypo_ids=...)`": forks,
    "`session.step(hidden, prompts=...)`": session_prompts,
    '`tuning_mode="ptune"`, `"deep_ptune"`, `pre_seq_len=16`': tuning,
    "`model.transformer.prompt_embeddings`, `intermediate_prompt_embeddings`": tuning,
    "`model.transformer.get_prompt(batch_size)`": tuning,
    "`model.score` of a sequence classifier": classifier,
    "a module of your own between `layers[:n]` and `layers[n:]`": own_module,
    "LoRA by `peft.get_peft_model`, with weights and optimizer at the client": lora,
}
#: Of these a GPU is needed, or other tests tell: of trained spans, of what is saved and shared.
ELSEWHERE = ("`model.cuda()`", "`peerd train-span`", "`model.save_pretrained`")


def rows_of(section: str) -> list[str]:
    """The first cells of a section's table; of what Petals has not, the second."""
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    cells = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    return [(second if first.strip() == "\N{EN DASH}" else first).strip() for first, second in cells]


def test_every_row_of_the_page_is_run_here_or_elsewhere() -> None:
    rows = [row for section in ("Clients", "Training") for row in rows_of(section)]
    assert [row for row in rows if not row.startswith(ELSEWHERE)] == list(ROWS)


@pytest.mark.parametrize("run", list(dict.fromkeys(ROWS.values())), ids=lambda run: run.__name__)
def test_what_takes_the_place_of_petals_calls_does_the_same(run: Callable[[World], None], world: World) -> None:
    run(world)
