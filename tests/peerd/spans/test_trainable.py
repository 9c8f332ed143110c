"""A client trains whole blocks of servers whose operators allow it, and the swarm then serves another model."""

from __future__ import annotations

import resource
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio

import peerd
from peerd.cli.keys.identity_file import load_or_create_identity
from peerd.cli.options.shared import JoinOptions
from peerd.cli.training.span import TrainRequest, train_span
from peerd.client.training.span_training import SpanTraining, open_span_training
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.checkpoint.trained import Description, base_of
from peerd.protocol.errors import (
    BadResult,
    ContextTooLong,
    Draining,
    InvalidRequest,
    NoRoom,
    NotServed,
    Overloaded,
    UnsupportedFeature,
)
from peerd.protocol.identity import Identity
from peerd.spans.spec import Trainable
from peerd.spans.trainable import TrainableSpans

pytestmark = [pytest.mark.real_time, pytest.mark.slow]

LISTEN = "/ip4/127.0.0.1/tcp/0/ws"
OURS, FRONT, BACK = Identity.generate(), Identity.generate(), Identity.generate()
TRAINED = [peerd.Span(0, 2), peerd.Span(2, 3)]
RATE, DECAY = 1e-3, 0.1
TEXTS = [[5, 9, 14, 3, 22], [7, 1, 30], [9, 9, 4, 17]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four blocks, with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(3)
    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        vocab_size=32,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a").save_pretrained(folder)
    return folder


class Local:
    """The same blocks trained by torch, with Transformers' own loss."""

    def __init__(self, path: Path) -> None:
        from transformers import LlamaForCausalLM

        self.model: Any = LlamaForCausalLM.from_pretrained(path).requires_grad_(False)
        parameters = [each.requires_grad_() for each in self.model.model.layers[:3].parameters()]
        self._optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)

    def train(self, steps: int) -> list[float]:
        count = sum(len(text) - 1 for text in TEXTS)
        losses = []
        for _ in range(steps):
            # Each text's mean, weighted by the tokens that it predicts.
            loss = (
                torch.stack(
                    [
                        self.model(input_ids=torch.tensor([text]), labels=torch.tensor([text])).loss * (len(text) - 1)
                        for text in TEXTS
                    ]
                ).sum()
                / count
            )
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@asynccontextmanager
async def serving(
    path: Path,
    folder: Path | None,
    span: peerd.Span,
    identity: Identity,
    bootstrap: Sequence[peerd.Multiaddr] = (),
    allowed: peerd.PeerId = OURS.peer_id,
) -> AsyncIterator[peerd.Peer]:
    """A server. `folder`: where the snapshots of our client are; None: nobody may train."""
    trainable = Trainable(frozenset({allowed}), folder, max_rate=0.01, max_steps=6) if folder else None
    spec = peerd.ServeSpec(path, span, kv_tokens=256, throughput=1000.0, stay=True, trainable=trainable)
    async with peerd.open_peer(identity, listen=[LISTEN], serve=[spec], bootstrap=bootstrap) as peer:
        yield peer


@asynccontextmanager
async def training(
    peer: peerd.Peer, path: Path, spans: Sequence[peerd.Span] = TRAINED, **options: Any
) -> AsyncIterator[SpanTraining]:
    async with (
        peer.model(path) as model,
        open_span_training(model, spans, decay=DECAY, **options) as opened,
    ):
        yield opened


async def steps(opened: SpanTraining, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        losses.append(await opened.accumulate(TEXTS))
        await opened.update(RATE)
    return losses


async def greedy(peer: peerd.Peer, path: Path) -> list[int]:
    async with peer.model(path) as model:
        generation = model.generate(TEXTS[0], temperature=0, max_new_tokens=8, eos_token_ids=())
        return [token.id async for token in generation]


async def test_trained_blocks_equal_local_training_and_are_another_model(path: Path, tmp_path: Path) -> None:
    local = Local(path)
    expected, before = local.train(5), Local(path).model
    async with (
        serving(path, tmp_path / "front", peerd.Span(0, 2), FRONT) as front,
        serving(path, tmp_path / "back", peerd.Span(2, 4), BACK, front.addresses) as back,
        peerd.open_peer(OURS, bootstrap=front.addresses) as ours,
        peerd.open_peer(bootstrap=front.addresses) as other,
    ):
        async with training(ours, path) as opened:
            found = await steps(opened, 5)
            blocks = await opened.save()
            digest = await opened.publish(blocks)
            # Neither the client nor the server goes beyond the operator's limits, and the training goes on.
            with pytest.raises(InvalidRequest, match=rf"0\.5: {FRONT.peer_id} allows 0\.01 at most"):
                await opened.update(0.5)
            for lane in opened._lanes:
                with pytest.raises(InvalidRequest, match=r"0\.5: this peer allows 0\.01 at most"):
                    await lane.update(0.5)
            await steps(opened, 1)
            with pytest.raises(InvalidRequest, match=rf"step 7: {FRONT.peer_id} allows 6 steps"):
                await steps(opened, 1)
            for lane in opened._lanes:
                with pytest.raises(InvalidRequest, match="step 7: this peer allows 6 steps"):
                    await lane.update(RATE)
        assert found == pytest.approx(expected, abs=1e-4)
        assert found[-1] < found[0]
        with open_checkpoint(path) as base:
            mine = Description(base_of(base), base.model_digest, blocks)
            assert digest == mine.model_digest != base.model_digest
        mine.write(tmp_path / "mine")
        prompt = torch.tensor([TEXTS[0]])
        options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
        for peer in (front, back):
            peer.discovery.announce_soon()
            await peer.discovery.wait_announced()
        for folder, model in ((tmp_path / "mine", local.model), (path, before)):
            answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert await greedy(other, folder) == answer[0, len(TEXTS[0]) :].tolist()
        # Publishing again replaces what was published.
        async with training(ours, path, step=0) as opened:
            await steps(opened, 1)
            await opened.publish(await opened.save())
        assert len(front.served) == len(back.served) == 2
        assert digest not in {served.model for served in (*front.served, *back.served)}


async def test_more_positions_than_a_request_may_have_go_in_several(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerd.server.training.span_training.MAX_PASS_POSITIONS", 7)
    expected = Local(path).train(3)
    async with (
        serving(path, tmp_path / "all", peerd.Span(0, 4), FRONT) as server,
        peerd.open_peer(OURS, bootstrap=server.addresses) as ours,
        training(ours, path, [peerd.Span(0, 3)]) as opened,
    ):
        assert await steps(opened, 3) == pytest.approx(expected, abs=1e-4)
        with pytest.raises(ContextTooLong, match="a text of 3000 tokens: the model takes 2048"):
            await opened.accumulate([[1] * 3000])
        # Nothing was sent, so the training goes on.
        await steps(opened, 1)


async def test_a_server_that_dies_costs_only_the_steps_since_the_last_snapshot(path: Path, tmp_path: Path) -> None:
    expected = Local(path).train(4)
    front, back = peerd.Span(0, 2), peerd.Span(2, 4)
    async with serving(path, tmp_path / "back", back, BACK) as stays, trio.open_nursery() as nursery:

        async def die(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
            with trio.CancelScope() as scope:
                async with serving(path, tmp_path / "front", front, FRONT, stays.addresses):
                    task_status.started(scope)
                    await trio.sleep_forever()

        scope = await nursery.start(die)
        async with peerd.open_peer(OURS, bootstrap=stays.addresses) as ours, training(ours, path) as opened:
            assert await steps(opened, 1) == pytest.approx(expected[:1], abs=1e-4)
            await opened.save()
            assert await steps(opened, 1) == pytest.approx(expected[1:2], abs=1e-4)
            # The other peer alone gets as far as a snapshot of the second step.
            await opened._lanes[1].save()
            scope.cancel()
            with pytest.raises(peerd.PeerFault):
                await steps(opened, 1)
        async with (
            serving(path, tmp_path / "front", front, FRONT, stays.addresses),
            peerd.open_peer(OURS, bootstrap=stays.addresses) as ours,
            training(ours, path) as opened,
        ):
            assert opened.step == 1
            assert await steps(opened, 3) == pytest.approx(expected[1:4], abs=1e-4)


async def test_only_those_whom_the_operator_names_may_train(path: Path, tmp_path: Path) -> None:
    async with (
        serving(path, tmp_path / "front", peerd.Span(0, 2), FRONT) as front,
        serving(path, None, peerd.Span(2, 4), BACK, front.addresses),
        peerd.open_peer(OURS, bootstrap=front.addresses) as ours,
        peerd.open_peer(bootstrap=front.addresses) as stranger,
    ):
        with pytest.raises(UnsupportedFeature, match=f"--trainable {stranger.peer_id}"):
            async with training(stranger, path, TRAINED[:1]):
                pass
        with pytest.raises(UnsupportedFeature, match="started without --trainable"):
            async with training(ours, path, TRAINED[1:]):
                pass
        with pytest.raises(NotServed, match="no single peer serves blocks 1:3"):
            async with training(ours, path, [peerd.Span(1, 3)]):
                pass
        with pytest.raises(InvalidRequest, match="no snapshot of step 3 here; there is none"):
            async with training(ours, path, TRAINED[:1], step=3):
                pass
        with pytest.raises(InvalidRequest, match="have no block in common"):
            async with training(ours, path, [peerd.Span(0, 2), peerd.Span(1, 2)]):
                pass
        async with training(ours, path, TRAINED[:1]) as opened:
            with pytest.raises(Overloaded, match="is being trained now"):
                async with training(ours, path, TRAINED[:1]):
                    pass
            with pytest.raises(InvalidRequest, match="save first"):
                await opened.publish({0: bytes(32), 1: bytes(32)})
            await opened.save()
            with pytest.raises(InvalidRequest, match="not the digests of the blocks that were saved"):
                await opened.publish({0: bytes(32), 1: bytes(32)})
            (lane,) = opened._lanes
            done = await lane.forward([2], torch.randn(2, 32))
            with pytest.raises(BadResult):
                await lane.backward(done, torch.full((2, 32), 3e38))
            with pytest.raises(InvalidRequest, match="run a backward first"):
                await opened.update(RATE)
            # All that went wrong has ended nothing.
            assert await steps(opened, 1)
            assert opened.step == 1


async def test_a_full_disk_costs_a_snapshot_and_not_the_training(path: Path, tmp_path: Path) -> None:
    async with (
        serving(path, tmp_path / "all", peerd.Span(0, 4), FRONT) as server,
        peerd.open_peer(OURS, bootstrap=server.addresses) as ours,
        training(ours, path, TRAINED[:1]) as opened,
    ):
        await steps(opened, 1)
        with files_of_at_most(4096), pytest.raises(NoRoom, match=r"the snapshot cannot be written here: .*large"):
            await opened.save()
        blocks = await opened.save()
        with files_of_at_most(16), pytest.raises(NoRoom, match="trained blocks cannot be written here: File too large"):
            await opened.publish(blocks)
        await opened.publish(blocks)
        assert len(server.served) == 2


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to write more into any file, as where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("ends", ["served", "cancelled", "refused"])
async def test_what_was_published_before_goes_when_the_new_is_served_however_that_ends(
    path: Path, tmp_path: Path, ends: str
) -> None:
    def slot(model: Path, digest: bytes) -> Any:
        loader = SimpleNamespace(spec=peerd.ServeSpec(model, stay=True))
        return SimpleNamespace(loader=loader, served=SimpleNamespace(model=digest))

    other, old = slot(tmp_path / "other" / "published-1", bytes(32)), slot(tmp_path / "copy" / "published-1", bytes(32))
    slots, withdrawn = [other, old], []

    async def serve(spec: peerd.ServeSpec) -> None:
        # The base may be a GGUF file that llama.cpp computes; trained blocks are none.
        assert spec.engine == "auto"
        if ends != "refused":
            slots.append(slot(Path(spec.model), description.model_digest))
        if ends == "cancelled":
            scope.cancel()
        await trio.lowlevel.checkpoint()
        if ends == "refused":
            raise NoRoom("no")

    async def withdraw(slot: Any) -> None:
        await trio.lowlevel.checkpoint()
        withdrawn.append(slot)

    with open_checkpoint(path) as base:
        description = Description(base_of(base), base.model_digest, {0: bytes(32)})
    model = SimpleNamespace(span=peerd.Span(2, 3))
    copy: Any = SimpleNamespace(
        folder=tmp_path / "copy",
        newest=None,
        served=peerd.Span(0, 4),
        spec=peerd.ServeSpec(path, stay=True, engine="llamacpp"),
        trainer=SimpleNamespace(model=model, step=1),
    )
    spans: Any = TrainableSpans(slots, serve, withdraw)  # type: ignore[arg-type]
    with trio.CancelScope() as scope, suppress(NoRoom):
        await spans.publish(copy, description)
    assert withdrawn == ([] if ends == "refused" else [old])


async def test_no_copy_opens_beside_a_span_that_left_while_it_was_loaded(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peerd.spans import trainable

    async with (
        serving(path, tmp_path / "all", peerd.Span(0, 4), FRONT) as server,
        peerd.open_peer(OURS, bootstrap=server.addresses) as ours,
    ):
        host = server._spans
        assert host is not None
        (slot,) = host._slots

        def load_while_it_leaves(load: Any) -> Any:
            trio.from_thread.run(host.withdraw, slot)
            slot.vacate()
            return run(load)

        run = trainable._Loading.run
        monkeypatch.setattr(trainable._Loading, "run", load_while_it_leaves)
        with pytest.raises((Draining, NotServed), match="left while the copy was loaded"):
            async with training(ours, path, TRAINED[:1]):
                pass


async def test_the_command_trains_saves_and_goes_on_where_it_was(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def request(steps: int, *, publish: bool = False, from_step: int | None = None) -> TrainRequest:
        return TrainRequest(
            spans=(peerd.Span(0, 2),),
            text="a " * 40,
            output=tmp_path / "mine",
            steps=steps,
            rate=RATE,
            optimizer="sgd",
            decay=0.0,
            clip=1.0,
            rows=2,
            length=8,
            save_every=2,
            from_step=from_step,
            publish=publish,
            peer=FRONT.peer_id,
            seed=0,
            identity=key,
        )

    key = tmp_path / "training.key"
    with load_or_create_identity(key) as identity:
        allowed = identity.peer_id
    async with serving(path, tmp_path / "front", peerd.Span(0, 4), FRONT, allowed=allowed) as front:
        swarm = JoinOptions(front.addresses, None, None)
        await train_span(path, swarm, request(3))
        first = Description.read(tmp_path / "mine" / "peerd-trained.json")
        # Three more steps from the third, or from the second: each step has the same pieces of text.
        await train_span(path, swarm, request(4, from_step=2))
        again = Description.read(tmp_path / "mine" / "peerd-trained.json")
        await train_span(path, swarm, request(4, publish=True))
        assert len(front.served) == 2
        assert front.served[1].model == again.model_digest
        # The description opens as a Transformers model too.
        opening = partial(
            peerd.RemoteModelForCausalLM.from_pretrained, tmp_path / "mine", bootstrap=list(front.addresses)
        )
        facade: Any = await trio.to_thread.run_sync(opening)
        try:
            ids = torch.tensor([TEXTS[0]])
            with torch.no_grad():
                found = (await trio.to_thread.run_sync(facade, ids)).logits
                assert not torch.allclose(found, Local(path).model(ids).logits, atol=1e-4)
        finally:
            await trio.to_thread.run_sync(facade.close)
    said = capsys.readouterr().err
    assert [line.split()[1] for line in said.splitlines() if line.startswith("step ")] == ["1", "2", "3", "3", "4"]
    assert first.blocks.keys() == again.blocks.keys() == {0, 1}
    assert first.blocks != again.blocks
    losses = [line.split()[3] for line in said.splitlines() if line.startswith("step 3 ")]
    assert losses[0] == losses[1]
    assert f"training as {allowed}" in said
