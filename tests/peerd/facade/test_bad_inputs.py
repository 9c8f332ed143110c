"""Bad input ends in an error that names the argument and the fix, and has no other effect."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import peerd
from peerd.compute.transformers_compat import cache_argument
from peerd.facade.inputs import check_ids
from peerd.protocol.errors import ContextTooLong, InvalidRequest, NoChain
from tests.peerd.facade.conftest import Servers

pytestmark = pytest.mark.real_time

IDS = torch.tensor([[3, 14, 15, 92]])
LONGEST = 2048


def ids(rows: int, columns: int) -> torch.Tensor:
    return torch.ones(rows, columns, dtype=torch.long)


def going_on(model: Any, more: torch.Tensor, **arguments: Any) -> Any:
    """Go on with a cache of four columns, which a bad call must not change."""
    cache = DynamicCache()
    name = cache_argument(type(model).forward)
    model(IDS, use_cache=True, **{name: cache})
    expected = model(IDS[:, :1], use_cache=True, **{name: cache}).logits
    cache.crop(-1)
    try:
        return model(more, use_cache=True, **{name: cache}, **arguments)
    finally:
        assert cache.get_seq_length() == 4
        torch.testing.assert_close(model(IDS[:, :1], use_cache=True, **{name: cache}).logits, expected)


Case = tuple[Callable[[Any], object], type[Exception], str]
CASES: dict[str, Case] = {
    "ids of one dimension": (lambda m: m(IDS[0]), ValueError, r"input_ids are \[rows, columns\].*input_ids\[None\]"),
    "ids that are no numbers of tokens": (
        lambda m: m(torch.rand(1, 4)),
        ValueError,
        "whole numbers, not torch.float32",
    ),
    "another model's tokenizer": (
        lambda m: m(torch.tensor([[1, 300]])),
        ValueError,
        r"token 300 is none of the model's, 0 to 259.*AutoTokenizer.from_pretrained\(",
    ),
    "another model's tokenizer in generate": (
        lambda m: m.generate(torch.tensor([[1, 300]]), max_new_tokens=2),
        ValueError,
        "token 300 is none of the model's",
    ),
    "labels instead of ids": (lambda m: m(torch.tensor([[1, -100]])), ValueError, "token -100 .* or these are labels"),
    "no row": (lambda m: m(ids(0, 4)), ValueError, "at least one of each"),
    "no column": (lambda m: m(ids(1, 0)), ValueError, "at least one of each"),
    "neither ids nor embeddings": (lambda m: m(), ValueError, "input_ids or inputs_embeds"),
    "narrow embeddings": (
        lambda m: m(inputs_embeds=torch.ones(1, 4, 32)),
        ValueError,
        r"hidden states are \[rows, columns, 64\].*not \[1, 4, 32\]",
    ),
    "embeddings of two dimensions": (lambda m: m(inputs_embeds=torch.ones(4, 64)), ValueError, "inputs_embeds are"),
    "embeddings that are not finite": (
        lambda m: m(inputs_embeds=torch.full((1, 4, 64), float("nan"))),
        InvalidRequest,
        "not finite",
    ),
    "a mask of other rows": (
        lambda m: m(IDS, attention_mask=ids(2, 4)),
        ValueError,
        r"of \[2, 4\]: here it is \[1, 4\]",
    ),
    "a mask that is too short": (lambda m: m(IDS, attention_mask=ids(1, 3)), ValueError, r"here it is \[1, 4\]"),
    "a mask that is too long": (lambda m: m(IDS, attention_mask=ids(1, 9)), ValueError, r"here it is \[1, 4\]"),
    "a mask that does not fit the cache": (
        lambda m: going_on(m, IDS[:, :2], attention_mask=ids(1, 5)),
        ValueError,
        r"here it is \[1, 6\], of which 4 are in the cache",
    ),
    "a mask of nothing": (lambda m: m(IDS, attention_mask=0 * ids(1, 4)), ValueError, "every position is masked"),
    "a mask of four dimensions": (
        lambda m: m(IDS, attention_mask=torch.ones(1, 1, 4, 4)),
        ValueError,
        r"attention_mask of \[rows, columns\]",
    ),
    "positions with gaps": (
        lambda m: m(IDS, position_ids=torch.tensor([[0, 2, 4, 6]])),
        ValueError,
        "position_ids with gaps.*leave them out",
    ),
    "positions of other columns": (
        lambda m: m(IDS, position_ids=torch.arange(9)[None]),
        ValueError,
        r"position_ids of \[1, 9\]: here they are \[1, 4\]",
    ),
    "positions that are no whole numbers": (
        lambda m: m(IDS, position_ids=torch.rand(1, 4)),
        ValueError,
        "position_ids are whole numbers",
    ),
    "attention weights": (lambda m: m(IDS, output_attentions=True), ValueError, "output_attentions.*leave it out"),
    "continuous batching": (
        lambda m: m.generate_batch([IDS[0].tolist()], max_new_tokens=2),
        NotImplementedError,
        r"continuous batching .*: give generate\(\) a padded batch",
    ),
    "attention weights in generate": (
        lambda m: m.generate(IDS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True),
        ValueError,
        "output_attentions.*leave it out",
    ),
    "a static cache": (
        lambda m: m.generate(IDS, max_new_tokens=3, cache_implementation="static"),
        ValueError,
        "cache_implementation='static'.*leave it out",
    ),
    "a tuple as cache": (
        lambda m: m(IDS, **{cache_argument(type(m).forward): ((torch.ones(1, 2, 3, 4),) * 2,) * 8}),
        TypeError,
        "leave the cache out",
    ),
    "other rows than the cache's": (lambda m: going_on(m, ids(2, 1)), ValueError, "2 rows, where the cache has 1"),
    "a row too long": (lambda m: m(ids(1, LONGEST + 1)), ContextTooLong, "takes 2048: shorten it"),
    "a prompt too long for a cache": (
        lambda m: m(ids(1, LONGEST + 1), use_cache=True),
        ContextTooLong,
        r"2049 positions .*takes 2048",
    ),
    "a cache too long": (lambda m: going_on(m, ids(1, LONGEST)), ContextTooLong, "takes 2048: begin a new cache"),
    "an answer too long": (
        lambda m: m.generate(IDS, max_new_tokens=LONGEST),
        ContextTooLong,
        "shorten the prompt or max_new_tokens",
    ),
    "more rows than a session has": (
        lambda m: m(ids(257, 1), use_cache=True),
        InvalidRequest,
        "257 rows at once, a session has at most 256: generate in several calls",
    ),
    "more rows and positions than a server has memory for": (
        lambda m: m(ids(100, 300), use_cache=True),
        ContextTooLong,
        # The first hop to answer names the memory that it lacks: for KV, or for outputs until they are sent on.
        "exceed this peer's .*: ask for fewer rows or positions at once",
    ),
    "an answer that needs more memory than a server has": (
        lambda m: m.generate(ids(50, 300), attention_mask=ids(50, 300), max_new_tokens=2),
        ContextTooLong,
        "50 rows of 302 positions exceed this peer's 8192 KV tokens: ask for fewer rows or positions at once",
    ),
    "narrow hidden states for a slice": (
        lambda m: m.model.layers[2:4](torch.ones(1, 2, 32)),
        ValueError,
        r"\[rows, columns, 64\]",
    ),
    "a slice's mask that does not fit": (
        lambda m: m.model.layers[2:4](torch.ones(1, 2, 64), ids(1, 5)),
        ValueError,
        r"attention_mask of \[1, 5\] for hidden states of \[1, 2\]",
    ),
}


@pytest.fixture(scope="module")
def expected(_opened: Any) -> torch.Tensor:
    return answer(_opened)


def answer(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(IDS, attention_mask=ids(1, 4), max_new_tokens=2, do_sample=False)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_error_names_the_way_out_and_the_model_stays_usable(case: str, remote: Any, expected: torch.Tensor) -> None:
    call, error, said = CASES[case]
    with torch.no_grad(), pytest.raises(error, match=said):
        call(remote)
    assert torch.equal(answer(remote), expected)


@pytest.mark.parametrize(
    ("model", "call"),
    [
        ("org/name", "AutoTokenizer.from_pretrained('org/name')"),
        ("/models/small", "AutoTokenizer.from_pretrained('/models/small')"),
        ("/models/small/q4.gguf", "AutoTokenizer.from_pretrained('/models/small', gguf_file='q4.gguf')"),
        ("org/name/q4.GGUF", "AutoTokenizer.from_pretrained('org/name', gguf_file='q4.GGUF')"),
        ("q4.gguf", "AutoTokenizer.from_pretrained('.', gguf_file='q4.gguf')"),
        ("org/name:Q4_K_M", "the tokenizer of org/name:Q4_K_M"),
    ],
)
def test_the_tokenizer_that_fits_is_named_so_that_transformers_opens_it(model: str, call: str) -> None:
    with pytest.raises(ValueError, match=f"; use {re.escape(call)}"):
        check_ids(torch.tensor([[7]]), vocabulary=5, model=model)


@pytest.fixture
def another(tmp_path: Path) -> Path:
    """A model like the Llama of these tests, with other weights and twice as wide, which no server has."""
    torch.manual_seed(5)
    config = LlamaConfig(
        num_hidden_layers=8, hidden_size=128, intermediate_size=96, num_attention_heads=4, vocab_size=260
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "another")
    return tmp_path / "another"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_belongs_to_another_model_is_refused(
    expected: torch.Tensor, another: Path, llama_path: Path, servers: Servers, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    other = peft.get_peft_model(LlamaForCausalLM.from_pretrained(another), config)
    other.save_pretrained(tmp_path / "adapter")
    with peerd.RemoteModelForCausalLM.from_pretrained(
        another, bootstrap=servers.bootstrap, tuning_mode="ptune", pre_seq_len=2
    ) as model:
        with pytest.raises(NoChain, match=r"no peer that we know of serves the model [0-9a-f]{8}\..* very same files"):
            model(IDS, use_cache=False)
        model.save_pretrained(tmp_path / "prompts")
    with peerd.RemoteModelForCausalLM.from_pretrained(llama_path, bootstrap=servers.bootstrap) as model:
        with pytest.raises(
            ValueError,
            match=r"was trained for another model, .* \(digest \w+, this one has \w+\): load it beside that model",
        ):
            model.load_trained(tmp_path / "prompts")
        # This is peft's own refusal. It leaves its layers in the model, where they change nothing.
        with pytest.raises(RuntimeError, match=r"size mismatch for .*q_proj\.lora_A"):
            peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
        assert torch.equal(answer(model), expected)


def test_bad_input_in_training_leaves_gradients_of_the_next_step_exact(remote: Any, local: Any) -> None:
    gradients = []
    for model in (remote, copy.deepcopy(local)):
        leaf = model.get_input_embeddings()(IDS).detach().requires_grad_()
        with pytest.raises((InvalidRequest, ValueError, RuntimeError)):
            model(inputs_embeds=torch.cat((leaf, leaf), 2), use_cache=False)
        model(inputs_embeds=leaf, labels=IDS, use_cache=False).loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
