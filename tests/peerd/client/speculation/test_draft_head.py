"""A draft head that a swarm trained, on loopback: the same tokens; and what it does when it cannot guess."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
import trio

import peerd
from peerd.cli.options.shared import JoinOptions
from peerd.cli.training.draft import DraftRequest, train_draft
from peerd.client.draft_texts import Texts
from peerd.client.speculation.confidence import GRADES, Ask
from peerd.client.speculation.draft_head import load_draft_head
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.drafting.files import DraftHeadFacts, read_head, write_head
from peerd.compute.drafting.guessing import DraftHead
from peerd.compute.drafting.network import DraftNetwork, DraftShape
from peerd.compute.drafting.training import Piece
from peerd.compute.model.head import load_head
from peerd.protocol.errors import InvalidRequest

pytestmark = pytest.mark.real_time
PROMPT = [*range(40, 60)]
ASK = Ask(3, 0.0, dict.fromkeys(GRADES, 1.0))


def serve(path):
    spec = peerd.ServeSpec(path, peerd.Span(0, 2), kv_tokens=4096, throughput=1000.0, stay=True)
    return peerd.open_peer(listen=["/ip4/127.0.0.1/tcp/0/ws"], serve=[spec])


async def answer(model, **asked):
    asked = {"temperature": 0, "max_new_tokens": 40, "eos_token_ids": []} | asked
    generation = model.generate(PROMPT, **asked)
    async for _ in generation:
        pass
    return generation


def request(output, **changed):
    default = DraftRequest(
        output=output,
        text="Once upon a time, " * 20,
        questions=("Why?", "How?") * 20,
        answers=True,
        minutes=0.02,
        tokens=1500,
        guessable=200,
        device="cpu",
        seed=1,
    )
    return replace(default, **changed)


async def test_a_trained_head_guesses_and_changes_no_token(path, always_asked, tmp_path):
    async with serve(path) as server:
        joining = JoinOptions(server.addresses, None, None)
        await train_draft(path, joining, request(tmp_path / "head"))
        _, facts = read_head(tmp_path / "head")
        assert len(facts.accepted) == 4
        assert 0.0 < facts.accepted[0] <= 1.0
        async with peerd.open_peer(bootstrap=server.addresses) as peer, peer.model(path) as model:
            plain = await answer(model)
            drawn = await answer(model, temperature=1.0, seed=4, repetition_penalty=1.2)
            assert facts.digest == model.facts.digest.hex()
            async with peer.drafting(model, tmp_path / "head"):
                drafted = await answer(model)
                assert drafted.token_ids == plain.token_ids
                assert drafted.drafted > 40
                assert drafted.accepted > 0
                redrawn = await answer(model, temperature=1.0, seed=4, repetition_penalty=1.2)
                assert redrawn.token_ids == drawn.token_ids


async def test_it_is_refused_where_the_last_server_draws(path, folder):
    async with peerd.open_peer() as peer, peer.model(path, remote_head=True) as model:
        with pytest.raises(InvalidRequest, match=r"mine guesses from hidden states, .* leave out the draft head, or"):
            async with peer.drafting(model, folder):
                pass


async def test_too_little_text_is_refused_with_what_to_do(path, tmp_path):
    async with serve(path) as server:
        joining = JoinOptions(server.addresses, None, None)
        with pytest.raises(InvalidRequest, match=r"only 0 tokens .* give a longer text, or --minutes"):
            await train_draft(path, joining, request(tmp_path / "head", text="Once", answers=False))


def test_texts_end_at_the_given_number_of_tokens():
    said = []
    texts = Texts(40, lambda texts: said.append(texts.tokens))
    for length in (8, 20, 30, 20):
        texts.add(Piece(torch.zeros(length, dtype=torch.long), torch.zeros(length, 4)))
    assert (said, [piece.length for piece in texts.pieces]) == ([20, 50], [20, 30])


@pytest.fixture
def head(path):
    with open_checkpoint(path) as checkpoint:
        return load_head(checkpoint)


@pytest.fixture
def folder(tmp_path):
    network = DraftNetwork(DraftShape.of_model(32, 257, 100))
    network.tokens.copy_(torch.arange(100))
    write_head(tmp_path / "mine", network, DraftHeadFacts("org/name", "00" * 32))
    return tmp_path / "mine"


def test_one_for_a_model_of_other_sizes_is_refused_by_name(folder, head, tmp_path):
    wide = DraftNetwork(DraftShape.of_model(64, 257, 100))
    write_head(tmp_path / "wide", wide, DraftHeadFacts("org/wide", ""))
    with pytest.raises(
        InvalidRequest, match=r"wide cannot draft for bytes: it was made for org/wide, with .* of 64 and"
    ):
        load_draft_head(tmp_path / "wide", head, "bytes", bytes(32))


def test_one_for_other_weights_is_used_with_a_warning(folder, head, caplog):
    with caplog.at_level(logging.WARNING):
        source = load_draft_head(folder, head, "bytes", bytes(32))
        assert caplog.text == ""
        load_draft_head(folder, head, "bytes", bytes([1] * 32))
    assert "mine was made for other weights of org/name" in caplog.text
    assert source.times.token_s > 0


def test_a_gpu_that_is_not_there_is_named(folder, head):
    with pytest.raises(InvalidRequest, match="there is no cuda:99 here for the draft head mine"):
        load_draft_head(folder, head, "bytes", bytes(32), device="cuda:99")


async def test_it_guesses_once_it_has_hidden_states_and_no_more_once_its_device_fails(
    folder, head, caplog, monkeypatch
):
    drafter = load_draft_head(folder, head, "bytes", bytes(32)).drafter(PROMPT, 100)
    assert not drafter.ready
    drafter.computed(len(PROMPT) - 2, torch.randn(1, 32))
    assert drafter.ready
    assert len(await drafter.propose(PROMPT, ASK)) == 3

    def fail(self, predicted):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DraftHead, "guess", fail)
    with caplog.at_level(logging.WARNING):
        assert len(await drafter.propose(PROMPT, ASK)) == 0
    assert "goes on without it: CUDA out of memory" in caplog.text
    drafter.computed(len(PROMPT) - 1, torch.randn(1, 32))
    assert not drafter.ready


async def test_a_cancelled_proposal_ends_before_its_next_token(folder, head, monkeypatch):
    drafter = load_draft_head(folder, head, "bytes", bytes(32)).drafter(PROMPT, 100)
    drafter.computed(len(PROMPT) - 2, torch.randn(1, 32))
    guess, calls = DraftHead.guess, []

    def cancelling(self, predicted):
        calls.append(1)
        trio.from_thread.run_sync(scope.cancel)
        return guess(self, predicted)

    monkeypatch.setattr(DraftHead, "guess", cancelling)
    with trio.CancelScope() as scope:
        await drafter.propose(PROMPT, ASK)
    assert scope.cancelled_caught
    assert len(calls) == 1
