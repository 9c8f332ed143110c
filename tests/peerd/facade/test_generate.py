"""`generate()` is Transformers' own, and gives the same result as with the whole model in this process."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from peerd.compute.transformers_compat import cache_argument
from peerd.facade.cache import RemoteCache
from peerd.protocol.errors import ContextTooLong

pytestmark = pytest.mark.real_time

PAD = 257
GREEDY = {"do_sample": False}


def ids(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of these lengths, left-padded, with their mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    rows = torch.full((len(lengths), longest), PAD)
    for row, length in zip(rows, lengths, strict=True):
        row[longest - length :] = torch.randint(0, 250, (length,), generator=generator)
    return {"input_ids": rows, "attention_mask": (rows != PAD).long()}


ONE, THREE = ids(7), ids(9, 2, 6, seed=1)
REPEATED = {
    "input_ids": torch.tensor([[5, 6, 7, 8] * 4 + [5, 6]]),
    "attention_mask": torch.ones(1, 18, dtype=torch.long),
}


def cache_of(output: Any, model: Any) -> Any:
    return getattr(output, cache_argument(type(model).forward))


def given(model: Any, cache: Any) -> dict[str, Any]:
    """A cache as an argument, by the name that this release of Transformers has for it."""
    return {cache_argument(type(model).forward): cache}


def sequences(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    found = model.generate(**inputs, **{"max_new_tokens": 16, **options})
    return found if isinstance(found, torch.Tensor) else found.sequences


CASES: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
    "greedy": (ONE, GREEDY),
    "greedy, a left-padded batch": (THREE, GREEDY),
    "sampling": (ONE, {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 40}),
    "sampling, a batch": (THREE, {"do_sample": True, "temperature": 1.1}),
    "four beams": (ONE, {"num_beams": 4, **GREEDY}),
    "beams of a batch, two returned": (
        THREE,
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.8, "early_stopping": True, **GREEDY},
    ),
    "beam sampling": (THREE, {"num_beams": 3, "do_sample": True}),
    "three samples of one prompt": (ONE, {"do_sample": True, "num_return_sequences": 3}),
    "penalties": (
        THREE,
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]], **GREEDY},
    ),
    "no cache": (ONE, {"use_cache": False, "max_new_tokens": 4, **GREEDY}),
    "prompt lookup": (REPEATED, {"prompt_lookup_num_tokens": 4, **GREEDY}),
    "early exit as assistant": (ONE, {"assistant_early_exit": 4, **GREEDY}),
    "prefill in chunks": (THREE, {"prefill_chunk_size": 4, **GREEDY}),
    "min_p and typical_p": (ONE, {"do_sample": True, "min_p": 0.05, "typical_p": 0.9}),
    "guidance, a second cache": (ONE, {"guidance_scale": 1.5, "max_new_tokens": 6, **GREEDY}),
    "an answer of a least length": (ONE, {"min_new_tokens": 4, "eos_token_id": list(range(0, 260, 3)), **GREEDY}),
    "rows that end at different times": (THREE, {"eos_token_id": list(range(0, 260, 4)), **GREEDY}),
    "allowed tokens": (THREE, {"prefix_allowed_tokens_fn": lambda row, _: [10 + row, 20, 30, 40], **GREEDY}),
}


@pytest.mark.parametrize("case", CASES)
def test_generate_gives_the_tokens_of_the_local_model(case: str, local: Any, remote: Any) -> None:
    inputs, options = CASES[case]
    assert torch.equal(sequences(remote, inputs, **options), sequences(local, inputs, **options))


def test_an_assistant_may_be_local_and_its_target_remote_or_the_other_way_round(local: Any, remote: Any) -> None:
    expected = sequences(local, ONE, **GREEDY)
    assert torch.equal(sequences(remote, ONE, assistant_model=local, **GREEDY), expected)
    drawn = [sequences(model, ONE, assistant_model=local, do_sample=True) for model in (remote, local)]
    assert torch.equal(*drawn)
    assert torch.equal(sequences(local, ONE, assistant_model=remote, **GREEDY), expected)


def test_scores_and_hidden_states_come_with_the_tokens(local: Any, remote: Any) -> None:
    options = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True, **GREEDY}
    torch.manual_seed(0)
    found, expected = (model.generate(**ONE, max_new_tokens=4, **options) for model in (remote, local))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=1e-3, atol=1e-3)


def test_a_prompt_may_be_embeddings(local: Any, remote: Any) -> None:
    embeds = {"inputs_embeds": local.get_input_embeddings()(ONE["input_ids"]), "attention_mask": ONE["attention_mask"]}
    assert torch.equal(sequences(remote, embeds, **GREEDY), sequences(local, embeds, **GREEDY))


@pytest.mark.filterwarnings("ignore:A decoder-only architecture is being used, but right-padding:UserWarning")
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_right_padded_batch_gives_what_each_row_gives_alone(use_cache: bool, local: Any, remote: Any) -> None:
    """The whole model predicts the first token from padding there, and Transformers warns of it."""
    lengths = THREE["attention_mask"].sum(1).tolist()
    rows = torch.full_like(THREE["input_ids"], PAD)
    for row, text, length in zip(rows, THREE["input_ids"], lengths, strict=True):
        row[:length] = text[-length:]
    found = sequences(
        remote,
        {"input_ids": rows, "attention_mask": (rows != PAD).long()},
        use_cache=use_cache,
        max_new_tokens=6,
        **GREEDY,
    )
    for row, text, length in zip(found, THREE["input_ids"], lengths, strict=True):
        alone = {"input_ids": text[None, -length:], "attention_mask": torch.ones(1, length)}
        expected = sequences(local, alone, max_new_tokens=6, **GREEDY)[0, length:]
        assert torch.equal(row[rows.shape[1] :], expected)


def test_a_generate_of_the_programs_own_may_reorder_the_cache(local: Any, remote: Any) -> None:
    """As diverse beams do, which Transformers ships apart: `custom_generate`."""

    def swap_and_step(model: Any, input_ids: torch.Tensor, generation_config: Any, **others: Any) -> torch.Tensor:
        """Greedy, but each row goes on from its neighbour's text, as a beam that was replaced does."""
        cache, turned, text = others[cache_argument(type(model).forward)], torch.tensor([1, 2, 0]), input_ids
        new = text
        for _ in range(generation_config.max_new_tokens):
            output = model(new, use_cache=True, **given(model, cache))
            text = torch.cat((text, output.logits[:, -1:].argmax(-1)), 1)[turned]
            cache.reorder_cache(turned)
            new = text[:, -1:]
        return text

    options: dict[str, Any] = {"custom_generate": swap_and_step, "max_new_tokens": 9}
    equal_rows = ids(7, 7, 7)
    found, expected = (model.generate(**equal_rows, **options, **GREEDY) for model in (remote, local))
    assert torch.equal(found, expected)


def test_a_streamer_hears_each_token_while_another_thread_generates(local: Any, remote: Any) -> None:
    class Heard(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    heard = Heard()
    thread = threading.Thread(target=lambda: sequences(remote, ONE, streamer=heard, **GREEDY))
    thread.start()
    thread.join()
    assert heard.tokens == sequences(local, ONE, **GREEDY)[0].tolist()


def test_a_stopping_criterion_ends_the_answer(local: Any, remote: Any) -> None:
    class AfterFive(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= ONE["input_ids"].shape[1] + 5)

    found = [
        sequences(model, ONE, stopping_criteria=StoppingCriteriaList([AfterFive()]), **GREEDY)
        for model in (remote, local)
    ]
    assert found[0].shape[1] == ONE["input_ids"].shape[1] + 5
    assert torch.equal(*found)


def test_a_stop_string_ends_each_row_where_it_ends_it_locally(local: Any, remote: Any, byte_tokenizer: Any) -> None:
    plain = sequences(local, THREE, **GREEDY)[:, THREE["input_ids"].shape[1] :]
    # Two letters that some row says, not at its beginning.
    stop = byte_tokenizer.decode(plain[1, 5:7])
    options = {"stop_strings": [stop], "tokenizer": byte_tokenizer, **GREEDY}
    found, expected = (sequences(model, THREE, **options) for model in (remote, local))
    assert torch.equal(found, expected)
    assert (found == PAD).sum() > (THREE["input_ids"] == PAD).sum()


@pytest.mark.parametrize("make", [lambda model: DynamicCache(config=model.config), lambda _: DynamicCache()])
def test_a_chat_goes_on_over_the_cache_that_the_program_made(
    make: Callable[[Any], Any], local: Any, remote: Any
) -> None:
    texts = []
    for model in (remote, local):
        cache, text = make(local), ONE["input_ids"]
        for turn in range(3):
            text = model.generate(
                text, attention_mask=torch.ones_like(text), **given(model, cache), max_new_tokens=6, **GREEDY
            )
            text = torch.cat((text, torch.tensor([[turn, 30, 31]])), 1)
        texts.append(text)
        if model is remote:
            assert isinstance(cache, RemoteCache)
    assert torch.equal(*texts)


def test_an_answer_goes_on_beyond_the_length_of_its_first_session(local: Any, remote: Any) -> None:
    texts = []
    for model in (remote, local):
        first = model.generate(**THREE, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
        text = torch.cat((first.sequences, torch.tensor([[9, 8]] * 3)), 1)
        new = torch.ones(3, text.shape[1] - THREE["attention_mask"].shape[1], dtype=torch.long)
        mask = torch.cat((THREE["attention_mask"], new), 1)
        cache = cache_of(first, model)
        texts.append(model.generate(text, attention_mask=mask, **given(model, cache), max_new_tokens=40, **GREEDY))
    assert torch.equal(*texts)


def test_a_cache_can_be_cropped_repeated_and_selected(local: Any, remote: Any) -> None:
    def answers(model: Any) -> list[torch.Tensor]:
        found = []

        def step(tokens: list[list[int]]) -> None:
            output = model(torch.tensor(tokens), use_cache=True, **given(model, cache))
            found.append(output.logits)

        with torch.no_grad():
            first = model(**ONE, use_cache=True)
            cache = cache_of(first, model)
            for token in range(4):
                step([[token]])
            cache.crop(-3)
            step([[7, 8, 9]])
            cache.batch_repeat_interleave(3)
            step([[1], [2], [3]])
            cache.batch_select_indices(torch.tensor([2, 0]))
            step([[4, 5], [6, 7]])
            cache.reorder_cache(torch.tensor([1, 1]))
            step([[1], [2]])
        return found

    torch.testing.assert_close(answers(remote), answers(local), rtol=1e-3, atol=2e-3)


def test_a_cache_can_be_cropped_further_than_its_session_was_opened_for(local: Any, remote: Any) -> None:
    text, found = ids(150)["input_ids"], []
    for model in (remote, local):
        cache = DynamicCache()
        with torch.no_grad():
            model(text, use_cache=True, **given(model, cache))
            model(text[:, :1], use_cache=True, **given(model, cache))
            cache.crop(-100)
            found.append(model(torch.tensor([[7, 8]]), use_cache=True, **given(model, cache)).logits)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_a_loop_that_never_asks_for_a_cache_gets_one_that_goes_on(local: Any, remote: Any) -> None:
    found, opened = [], remote.swarm.sessions_opened
    for model in (remote, local):
        with torch.no_grad():
            output, steps = model(ONE["input_ids"]), []
            assert remote.swarm.sessions_opened == opened + (model is local)
            for token in (5, 6):
                output = model(torch.tensor([[token]]), **given(model, cache_of(output, model)))
                steps.append(output.logits)
        found.append(steps)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_an_exception_in_generate_leaves_no_session_behind(remote: Any, servers: Any) -> None:
    def fail(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 10:
            raise ArithmeticError("of the program's own")
        return scores

    with pytest.raises(ArithmeticError, match="of the program's own"):
        sequences(remote, ONE, logits_processor=LogitsProcessorList([fail]), **GREEDY)
    # The traceback, which has the cache, is in a circle of references.
    gc.collect()
    wait_until(lambda: servers.sessions == 0)


def test_a_forgotten_cache_frees_its_sessions(remote: Any, servers: Any) -> None:
    with torch.no_grad():
        output = remote(**ONE, use_cache=True)
    assert servers.sessions == 2
    del output
    wait_until(lambda: servers.sessions == 0)


def test_generate_leaves_no_session_behind(remote: Any, servers: Any) -> None:
    sequences(remote, THREE, num_beams=3, **GREEDY)
    wait_until(lambda: servers.sessions == 0)


def test_beams_of_one_prompt_are_prefilled_once(remote: Any, servers: Any) -> None:
    engines = [peer.served[0].task.engine for peer in servers.peers]
    before = [engine.positions_computed for engine in engines]
    sequences(remote, ONE, num_beams=4, max_new_tokens=1, **GREEDY)
    assert [engine.positions_computed - was for engine, was in zip(engines, before, strict=True)] == [7, 7]


def test_padding_does_not_travel(remote: Any, servers: Any) -> None:
    engines = [peer.served[0].task.engine for peer in servers.peers]
    before = [engine.positions_computed for engine in engines]
    sequences(remote, THREE, max_new_tokens=1, **GREEDY)
    assert [engine.positions_computed - was for engine, was in zip(engines, before, strict=True)] == [17, 17]


def wait_until(condition: Callable[[], bool]) -> None:
    """For what happens in another thread's loop, soon."""
    told = threading.Event()
    for _ in range(200):
        if condition():
            return
        told.wait(0.05)
    raise AssertionError("it did not happen within 10 s")


@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded"])
def test_another_kind_of_cache_is_refused_by_its_name(implementation: str, remote: Any) -> None:
    with pytest.raises(ValueError, match=f"cache_implementation='{implementation}'.*leave it out"):
        remote.generate(**ONE, max_new_tokens=3, cache_implementation=implementation)


def test_what_servers_cannot_do_is_refused_with_what_to_do_instead(local: Any, remote: Any) -> None:
    static = StaticCache(config=local.config, max_cache_len=64)
    with pytest.raises(TypeError, match=r"StaticCache cannot hold .* empty DynamicCache"):
        remote.generate(**ONE, max_new_tokens=3, **given(remote, static))
    filled = cache_of(local(**ids(7, 7), use_cache=True), local)
    with pytest.raises(ValueError, match=r"local blocks that differ from row to row.* or one row at a time"):
        remote(torch.tensor([[1], [2]]), **given(remote, filled))
    with pytest.raises(ValueError, match=r"attention_mask of \[rows, columns\]"):
        remote(ONE["input_ids"], attention_mask=torch.ones(1, 1, 7, 7))
    with pytest.raises(ValueError, match="output_attentions"):
        remote(**ONE, output_attentions=True)
    with pytest.raises(ContextTooLong, match="shorten the prompt or max_new_tokens"):
        remote.generate(**ONE, max_new_tokens=10**6)
    assert sequences(remote, ONE, max_new_tokens=2, **GREEDY).shape == (1, 9)


def filled_by(local: Any) -> DynamicCache:
    """A cache with the keys and values of a text that local blocks have computed."""
    cache = DynamicCache()
    with torch.no_grad():
        local(**ONE, use_cache=True, **given(local, cache))
    return cache


def test_remote_blocks_go_on_over_keys_and_values_that_local_ones_computed(local: Any, remote: Any) -> None:
    more = torch.tensor([[9, 8, 7]])
    text = torch.cat((ONE["input_ids"], more), 1)
    expected = local.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=8, **GREEDY)
    cache = filled_by(local)
    found = remote.generate(
        text, attention_mask=torch.ones_like(text), **given(remote, cache), max_new_tokens=8, **GREEDY
    )
    assert torch.equal(found, expected)
    assert isinstance(cache, RemoteCache)
    cache.crop(12 - cache.columns)
    with torch.no_grad():
        logits = remote(expected[:, 12:14], use_cache=True, **given(remote, cache)).logits
        torch.testing.assert_close(logits, local(expected[:, :14]).logits[:, -2:], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="cut into the prefix of 7"):
        cache.crop(-10)


def test_hidden_states_behind_a_prefix_are_the_local_ones(local: Any, remote: Any) -> None:
    """Every run of blocks has a session of its own, with its part of the prefix."""
    more = torch.tensor([[9, 8, 7]])
    found = []
    for model in (remote, local):
        cache = filled_by(local)
        with torch.no_grad():
            steps = [
                model(more, **given(model, cache), use_cache=True, output_hidden_states=True).hidden_states
                for _ in range(2)
            ]
        found.append(steps)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_a_prefix_that_cannot_be_one_is_refused(remote: Any, local: Any) -> None:
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[0, 2] = 0
    cache = filled_by(local)
    with pytest.raises(ValueError, match="hides some of the cache's 7 positions"):
        remote(torch.tensor([[1]]), attention_mask=mask, **given(remote, cache))
    assert type(cache) is DynamicCache
    short = filled_by(local)
    del short.layers[-1]
    with pytest.raises(ValueError, match=r"values of 7 blocks, .* for each of 8.*LoraConfig"):
        remote(torch.tensor([[1]]), **given(remote, short))
