"""A whole model that guesses: what it guesses is what Transformers computes, however a text changes."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.greedy_text import GreedyText, WholeModel, load_whole
from peerd.compute.errors import BatchFailedError, NoRoomError

POSITIONS = 1024
TEXT = [(7 * place + 3) % 128 for place in range(50)]


class Given(Exception):
    """Raised by a caller who gives up."""


@pytest.fixture(scope="module", params=["llama", "mistral"])
def name(request):
    """A model that keeps everything, and one with windows of 16 positions."""
    return request.param


@pytest.fixture(scope="module")
def model(tiny_checkpoint, name) -> WholeModel:
    with open_checkpoint(tiny_checkpoint(name)) as checkpoint:
        return load_whole(checkpoint, positions=POSITIONS, max_length=400)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, name):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint(name), dtype=torch.float32).eval()


@pytest.fixture
def text(model):
    text = GreedyText(model, 400, 128)
    yield text
    text.close()
    assert model.free_positions == POSITIONS


def nothing():
    """A caller who does not give up."""


def guess(text, ids, count):
    return list(islice(text.guesses(ids, nothing), count))


def expected(reference, ids, count):
    ids, guesses = list(ids), []
    for _ in range(count):
        with torch.inference_mode():
            chances = reference(torch.tensor([ids])).logits[0, -1].softmax(0)
        guesses.append((int(chances.argmax()), float(chances.max())))
        ids.append(guesses[-1][0])
    return guesses


def check(text, reference, ids, count=6):
    found = guess(text, ids, count)
    wanted = expected(reference, ids, count)
    assert [one.token for one in found] == [token for token, _ in wanted]
    assert [one.chance for one in found] == pytest.approx([chance for _, chance in wanted], abs=1e-3)
    return [one.token for one in found]


def test_right_and_wrong_guesses_and_long_pauses_change_nothing(text, reference):
    tokens = check(text, reference, TEXT)
    longer = [*TEXT, *tokens[:2], (tokens[2] + 1) % 128]
    tokens = check(text, reference, longer)
    # All were right, and the token after them was drawn.
    longer = [*longer, *tokens, 5]
    tokens = check(text, reference, longer, 1)
    longer = [*longer, *TEXT]
    assert text.behind(longer) == len(TEXT)
    text.read(longer, nothing)
    assert text.behind(longer) == 1
    check(text, reference, longer)


def test_wrong_guesses_and_another_text_are_cut_off(text, reference):
    tokens = check(text, reference, TEXT)
    check(text, reference, [*TEXT, (tokens[0] + 1) % 128])
    check(text, reference, TEXT[::-1])
    check(text, reference, TEXT[:20])


def test_only_what_is_new_is_computed(text, model, monkeypatch):
    counts = []
    compute = WholeModel.compute
    monkeypatch.setattr(
        WholeModel, "compute", lambda self, *given: counts.append(len(given[-1])) or compute(self, *given)
    )
    tokens = [one.token for one in guess(text, TEXT, 3)]
    guess(text, [*TEXT, *tokens, 9], 2)
    guess(text, [*TEXT, *tokens, 9], 1)
    # The third guess was never computed, only given out.
    assert counts == [50, 1, 1, 2, 1, 1]


def test_a_long_text_is_computed_in_parts_and_may_be_given_up_between_them(text, reference):
    long = TEXT * 6
    pauses = iter([None, None, Given()])

    def pause():
        if (error := next(pauses)) is not None:
            raise error

    with pytest.raises(Given):
        next(text.guesses(long, pause))
    assert text.behind(long) == len(long) - 256
    check(text, reference, long, 2)


def test_it_ends_where_there_is_no_more_room(model, reference):
    text = GreedyText(model, 52, 128)
    assert len(guess(text, TEXT, 9)) == 3
    assert guess(text, [*TEXT, 1, 2, 3], 1) == []
    text.close()
    longest = GreedyText(model, 9999, 128)
    assert len(guess(longest, TEXT * 8, 2)) == 1
    longest.close()


@pytest.mark.parametrize("ids", [[], [1, 128], [-1, 1]])
def test_ids_that_the_model_does_not_have_are_not_guessed_from(text, ids):
    assert guess(text, ids, 2) == []
    text.read(ids, nothing)


def test_guesses_are_among_the_known_ids(model):
    text = GreedyText(model, 100, 7)
    assert all(one.token < 7 for one in guess(text, TEXT, 8))
    text.close()


def test_without_room_for_its_kv_no_text_is_opened(model):
    texts = [GreedyText(model, 400, 128)]
    while model.free_positions >= 400:
        texts.append(GreedyText(model, 400, 128))
    with pytest.raises(NoRoomError):
        GreedyText(model, 400, 128)
    for text in texts:
        text.close()
    assert model.free_positions == POSITIONS


def test_a_full_device_fails_the_guess_and_not_the_text(text, model, reference, monkeypatch):
    guess(text, TEXT, 2)

    def full(batch):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model._engine, "run", full)
        with pytest.raises(BatchFailedError):
            guess(text, [*TEXT, 1, 2], 1)
    check(text, reference, [*TEXT, 1, 2], 3)
