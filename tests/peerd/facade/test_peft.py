"""peft on remote blocks does the same as on local ones, or is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import peerd
from peerd.facade.weights import RemoteWeight

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.real_time,
    # peft 0.21 calls Transformers by old names, with local models too.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [32, 38, 46, 26, 43, 38, 32, 79]])
CAUSAL = {"task_type": "CAUSAL_LM"}


@pytest.fixture
def whole(local: Any) -> Any:
    """A copy of the local model to change."""
    return copy.deepcopy(local)


@pytest.fixture
def remote(servers: Any, llama_path: Path) -> Iterator[Any]:
    """A remote model of the test's own: peft changes what it wraps, and cannot undo all of it."""
    with peerd.RemoteModelForCausalLM.from_pretrained(llama_path, bootstrap=servers.bootstrap) as model:
        yield model


def adapted(model: Any, config: Any) -> Any:
    """The model in peft's hands. Drawn parameters are the same each time."""
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def losses(model: Any, steps: int = 8, rate: float = 1e-3) -> list[float]:
    optimizer = torch.optim.AdamW(trained(model), lr=rate)
    found = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


LORA: dict[str, dict[str, Any]] = {
    "every linear, rank-stabilised": {"r": 2, "target_modules": "all-linear", "use_rslora": True},
    "the LM head trained whole beside it": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "two blocks of eight": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [2, 5]},
}


@pytest.mark.parametrize("case", LORA)
def test_lora_trains_as_locally(case: str, remote: Any, whole: Any) -> None:
    found = []
    for model in (remote, whole):
        wrapped = adapted(model, peft.LoraConfig(**CAUSAL, **LORA[case]))
        found.append(losses(wrapped))
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert found[0][-1] < found[0][0]


def test_adapters_are_switched_combined_and_disabled_as_locally(remote: Any, whole: Any) -> None:
    logits: list[list[torch.Tensor]] = []
    for model in (remote, whole):
        wrapped = adapted(model, peft.LoraConfig(**CAUSAL, r=2, target_modules=["q_proj"]))
        with torch.no_grad():
            wrapped.add_adapter("other", peft.LoraConfig(**CAUSAL, r=4, target_modules=["q_proj", "v_proj"]))
            generator = torch.Generator().manual_seed(7)
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            found = []
            for names in (["default"], ["other"], ["default", "other"]):
                wrapped.base_model.set_adapter(names)
                found.append(wrapped(input_ids=IDS).logits)
            with wrapped.disable_adapter():
                found.append(wrapped(input_ids=IDS).logits)
            logits.append(found)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert all((one - other).abs().max() > 0.01 for one, other in zip(logits[0], logits[0][1:], strict=False))


def test_a_cache_is_not_continued_with_another_adapter(remote: Any) -> None:
    wrapped = adapted(remote, peft.LoraConfig(**CAUSAL, r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        output = wrapped(input_ids=IDS, use_cache=True)
        trained(wrapped)[1].add_(1.0)
        cache = getattr(output, "cache", None) or output.past_key_values
        with pytest.raises(ValueError, match=r"adapter or prompts have changed .* begin a new cache"):
            remote(IDS[:, :1], use_cache=True, past_key_values=cache)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=4),
        lambda: peft.PromptEncoderConfig(**CAUSAL, num_virtual_tokens=3, encoder_hidden_size=16),
    ],
    ids=["prompt tuning", "p-tuning"],
)
def test_prompts_of_peft_train_as_locally_and_answer_as_greedy_by_hand(
    config: Callable[[], Any], remote: Any, whole: Any, tmp_path: Path
) -> None:
    found = []
    for model in (remote, whole):
        wrapped = adapted(model, config())
        found.append(losses(wrapped, rate=1e-2))
        if model is not remote:
            continue
        wrapped.eval()
        # peft 0.21 gives its prompts again with every token of generate() where Transformers calls the cache
        # `cache`: what is right is found by hand, each time from the beginning.
        by_hand = IDS[:1]
        with torch.no_grad():
            for _ in range(6):
                mask = torch.ones_like(by_hand)
                logits = wrapped(input_ids=by_hand, attention_mask=mask).logits
                by_hand = torch.cat((by_hand, logits[:, -1:].argmax(-1)), 1)
        ones = torch.ones_like(IDS[:1])
        answer = wrapped.generate(input_ids=IDS[:1], attention_mask=ones, max_new_tokens=6, do_sample=False)
        assert torch.equal(answer, by_hand)
        wrapped.save_pretrained(tmp_path)
        expected = wrapped(input_ids=IDS).logits.detach()
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert found[0][-1] < found[0][0]
    plain = peft.PeftModel.from_pretrained(whole, tmp_path).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)


def test_gradient_checkpointing_and_autocast_change_what_they_change_locally(remote: Any, whole: Any) -> None:
    gradients, passes = [], remote.swarm.passes
    for model in (remote, whole):
        wrapped = adapted(model, peft.LoraConfig(**CAUSAL, r=4, target_modules=["q_proj", "v_proj"]))
        wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped.enable_input_require_grads()
        wrapped.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = wrapped(input_ids=IDS, labels=IDS).loss
        loss.backward()
        # B is zero at first, and so is A's gradient.
        gradients.append(torch.cat([each.grad.flatten() for each in trained(wrapped)]))
    assert remote.swarm.passes == passes + 1
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.98


REFUSED: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: peft.LoraConfig(**CAUSAL, r=2, use_dora=True, target_modules=["q_proj"]),
    "IA3": lambda: peft.IA3Config(**CAUSAL, target_modules=["k_proj"], feedforward_modules=[]),
    "VeRA": lambda: peft.VeraConfig(**CAUSAL, r=4, target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(**CAUSAL, target_modules=["q_proj"], r=0, oft_block_size=4),
    "PiSSA": lambda: peft.LoraConfig(**CAUSAL, r=2, init_lora_weights="pissa", target_modules=["q_proj"]),
    "a LoRA with biases": lambda: peft.LoraConfig(**CAUSAL, r=2, lora_bias=True, target_modules=["v_proj"]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", REFUSED)
def test_a_method_that_needs_the_weights_is_refused(method: str, remote: Any) -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match=r"servers|LoRA"):
        peft.get_peft_model(remote, REFUSED[method]())(input_ids=IDS)


def test_merging_is_refused(remote: Any) -> None:
    wrapped = adapted(remote, peft.LoraConfig(**CAUSAL, r=2, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match=r"this weight is on the servers of the swarm, .* merge it into the whole"):
        wrapped.merge_adapter()


PREFIXES: dict[str, dict[str, Any]] = {
    "as values": {},
    "through a small network": {"prefix_projection": True, "encoder_hidden_size": 16},
}


@pytest.mark.parametrize("case", PREFIXES)
def test_prefix_tuning_trains_as_locally_and_answers_as_greedy_by_hand(
    case: str, remote: Any, whole: Any, tmp_path: Path
) -> None:
    found = []
    config = peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4, **PREFIXES[case])
    for model in (remote, whole):
        wrapped = adapted(model, config)
        found.append(losses(wrapped, rate=1e-2))
        wrapped.eval()
        if model is not remote:
            continue
        by_hand = IDS[:1]
        with torch.no_grad():
            for _ in range(6):
                logits = wrapped(input_ids=by_hand).logits
                by_hand = torch.cat((by_hand, logits[:, -1:].argmax(-1)), 1)
        ones = torch.ones_like(IDS)
        opened = remote.swarm.sessions_opened
        answer = wrapped.generate(input_ids=IDS[:1], attention_mask=ones[:1], max_new_tokens=6, do_sample=False)
        assert torch.equal(answer, by_hand)
        assert remote.swarm.sessions_opened == opened + 1, "it keeps a cache"
        beams = wrapped.generate(input_ids=IDS, attention_mask=ones, max_new_tokens=6, do_sample=False, num_beams=3)
        wrapped.save_pretrained(tmp_path)
        expected = wrapped(input_ids=IDS).logits.detach()
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert found[0][-1] < found[0][0]
    plain = peft.PeftModel.from_pretrained(whole, tmp_path).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)
    again = peft.PeftModel.from_pretrained(remote, tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(
        again.generate(input_ids=IDS, attention_mask=ones, max_new_tokens=6, do_sample=False, num_beams=3), beams
    )


def test_preparing_for_few_bits_takes_no_memory(remote: Any) -> None:
    prepared = peft.prepare_model_for_kbit_training(remote, use_gradient_checkpointing=False)
    assert isinstance(prepared.model.layers[0].self_attn.q_proj.weight, RemoteWeight)
    found = losses(adapted(prepared, peft.LoraConfig(**CAUSAL, r=2, target_modules=["q_proj"])), 3, rate=1e-2)
    assert found[-1] < found[0]
