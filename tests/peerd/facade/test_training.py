"""Gradients flow through a swarm's blocks, to prompts, adapters, heads and a user's modules, as through local ones."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.utils import output_capturing

import peerd
from peerd.compute.transformers_compat import cache_argument
from peerd.facade.weights import RemoteWeight

pytestmark = [
    pytest.mark.real_time,
    # peft 0.21 asks by an old name, with local models too.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [32, 38, 46, 26, 43, 38, 32, 79]])
STEPS = 12


@pytest.fixture
def whole(local: Any) -> Any:
    """A copy of the local model to change."""
    return copy.deepcopy(local)


def losses(model: Any, parameters: list[nn.Parameter], steps: int = STEPS, **inputs: Any) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    found = []
    for _ in range(steps):
        loss = model(**{"input_ids": IDS, "labels": IDS, **inputs}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_the_model_is_the_architectures_own_and_its_blocks_hold_no_values(remote: Any) -> None:
    assert isinstance(remote, LlamaForCausalLM)
    assert isinstance(remote, peerd.RemoteModelForCausalLM)
    assert type(remote).__name__ == "LlamaForCausalLM"
    weight = remote.model.layers[2].self_attn.q_proj.weight
    assert isinstance(weight, RemoteWeight)
    assert weight.shape == (64, 64)
    with pytest.raises(RuntimeError, match="this weight is on the servers of the swarm"):
        weight + 1
    assert not any(name.startswith("model.layers") for name in remote.state_dict())


def test_loss_and_hidden_states_are_the_local_models(local: Any, remote: Any) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    # The prediction of a padding column has no meaning: even locally it changes when the padding changes.
    labels = IDS.masked_fill(mask.cumsum(1) <= 1, -100)
    with torch.no_grad():
        found, expected = (
            model(IDS, attention_mask=mask, labels=labels, output_hidden_states=True, use_cache=False)
            for model in (remote, local)
        )
    torch.testing.assert_close(found.loss, expected.loss)
    assert len(found.hidden_states) == len(expected.hidden_states) == 9
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("wanted", "runs"), [([3, 8], 2), ([0, -2], 2), ([1, 2, 5], 4)])
def test_chosen_hidden_states_cost_one_journey_for_each_place_between_blocks(
    wanted: list[int], runs: int, local: Any, remote: Any
) -> None:
    if not hasattr(output_capturing, "selected_hidden_states"):
        pytest.skip("this release of Transformers gives all hidden states or none")
    passes = remote.swarm.passes
    with torch.no_grad():
        found, expected = (
            model(IDS, output_hidden_states=wanted, use_cache=False).hidden_states for model in (remote, local)
        )
    assert remote.swarm.passes == passes + runs
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) is (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_forward_without_gradients_or_cache_opens_no_session(remote: Any, servers: Any) -> None:
    opened = remote.swarm.sessions_opened
    with torch.no_grad():
        remote(IDS)
    assert remote.swarm.sessions_opened == opened


def test_slices_of_blocks_compose_and_carry_gradients(local: Any, remote: Any) -> None:
    positions = torch.arange(8)[None]
    embeds = [model.model.embed_tokens(IDS).detach().requires_grad_() for model in (remote, local)]
    own = nn.Linear(64, 64)
    found = remote.model.layers[5:8](own(remote.model.layers[0:5](embeds[0])))
    rope = local.model.rotary_emb(embeds[1], positions)
    hidden = embeds[1]
    mask = torch.full((8, 8), float("-inf")).triu(1)[None, None]
    for index, layer in enumerate(local.model.layers):
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rope, position_ids=positions)
        hidden = own(hidden) if index == 4 else hidden
    torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-4)
    gradients = []
    for output, leaf in zip((found, hidden), embeds, strict=True):
        own.zero_grad()
        output.square().mean().backward()
        gradients.append((leaf.grad, own.weight.grad.clone()))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_a_users_module_between_blocks_is_called_in_generate_too(local: Any, remote: Any) -> None:
    def steer(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 1.5

    found = []
    for model in (remote, local):
        handle = model.model.layers[3].register_forward_hook(steer)
        try:
            found.append(model.generate(IDS, max_new_tokens=8, do_sample=False))
        finally:
            handle.remove()
    assert torch.equal(*found)


def test_sequences_packed_into_one_row_do_not_see_each_other(local: Any, remote: Any) -> None:
    packed = torch.cat((IDS[0, :5], IDS[1, :3]))[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    with torch.no_grad():
        found = remote(packed, position_ids=positions, use_cache=False).logits[0]
        expected = torch.cat((local(IDS[:1, :5]).logits[0], local(IDS[1:, :3]).logits[0]))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_prompts_train_as_they_would_locally(mode: str, servers: Any, llama_path: Path, whole: Any) -> None:
    torch.manual_seed(5)
    with peerd.RemoteModelForCausalLM.from_pretrained(
        llama_path, bootstrap=servers.bootstrap, tuning_mode=mode, pre_seq_len=3
    ) as model:
        prefix = nn.Parameter(model.prompts.prefix.detach().clone())
        deep = nn.Parameter(torch.zeros(8, 3, 64))
        found = losses(model, [p for p in model.parameters() if p.requires_grad])
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
        opened = model.swarm.sessions_opened
        answers = [model.generate(IDS[:1], attention_mask=torch.ones(1, 8), max_new_tokens=6, do_sample=False)]
        assert model.swarm.sessions_opened == opened + 1, "it keeps a cache"
        answers.append(model.generate(IDS, attention_mask=mask, max_new_tokens=4, num_beams=3, do_sample=False))
        with torch.no_grad():
            # A prompt that has changed must not go on over the KV of the one before.
            output = model(IDS, use_cache=True)
            model.prompts.prefix.add_(1.0)
            cache = getattr(output, "cache", None) or output.past_key_values
            with pytest.raises(ValueError, match=r"prompts have changed .* begin a new cache"):
                model(IDS[:, :1], past_key_values=cache)
            model.prompts.prefix.sub_(1.0)
            values = [each.detach().clone() for each in (model.prompts.prefix, model.prompts.deep) if each is not None]

    class Prompted(nn.Module):
        """The whole model with the same prompts, by hooks on its blocks."""

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            embeds = whole.model.embed_tokens(input_ids)
            embeds = torch.cat((prefix.expand(len(embeds), -1, -1), embeds), 1)
            # The last prompt predicts the first token, which the remote model, as Petals', does not count.
            padded = torch.cat((torch.full((len(labels), 4), -100), labels[:, 1:]), 1)
            return whole(inputs_embeds=embeds, labels=padded, use_cache=False)

    def add(index: int) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> Any:
            hidden = args[0]
            return (torch.cat((hidden[:, :3] + deep[index], hidden[:, 3:]), 1), *args[1:])

        return hook

    if mode == "deep_ptune":
        for index, layer in enumerate(whole.model.layers):
            layer.register_forward_pre_hook(add(index))
    expected = losses(Prompted(), [prefix, deep])
    assert found == pytest.approx(expected, abs=1e-3)
    assert found[-1] < found[0]
    with torch.no_grad():
        for own, trained in zip((prefix, deep), values, strict=False):
            own.copy_(trained)
        text = IDS[:1]
        for _ in range(6):
            logits = Prompted()(text, labels=text).logits
            text = torch.cat((text, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(answers[0], text)
    # Of the batch's padded row and its beams: what the row gives alone.
    assert answers[1].shape == (2, 12)


def test_peft_trains_lora_on_remote_blocks_as_on_local_ones(remote: Any, whole: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    found, answers = {}, {}
    for name, model in (("local", whole), ("remote", remote)):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        try:
            found[name] = losses(adapted, [p for p in adapted.parameters() if p.requires_grad])
            adapted.save_pretrained(tmp_path / name)
            adapted.eval()
            answers[name] = adapted.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
        finally:
            adapted.unload()
    again = peft.PeftModel.from_pretrained(whole, tmp_path / "remote").eval()
    answers["what the remote model saved, over the whole model"] = again.generate(
        input_ids=IDS, max_new_tokens=6, do_sample=False
    )
    assert all(torch.equal(answer, answers["local"]) for answer in answers.values())
    assert found["remote"] == pytest.approx(found["local"], abs=1e-3)
    assert found["remote"][-1] < found["remote"][0]


def test_what_is_more_than_a_lora_pair_is_refused_by_name(remote: Any) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(remote, peft.IA3Config(task_type="CAUSAL_LM"))
    try:
        with pytest.raises(NotImplementedError, match="servers do not compute"):
            adapted(input_ids=IDS)
    finally:
        adapted.unload()


def test_a_classifier_trains_its_own_head(servers: Any, llama_path: Path) -> None:
    labels = torch.tensor([0, 2])
    torch.manual_seed(0)
    with peerd.RemoteModelForSequenceClassification.from_pretrained(
        llama_path, num_labels=3, bootstrap=servers.bootstrap
    ) as model:
        assert isinstance(model, LlamaForSequenceClassification)
        model.config.pad_token_id = 257
        score = model.score.weight.detach().clone()
        found = losses(model, list(model.score.parameters()), labels=labels)
        model.save_pretrained(llama_path.parent / "classifier")
        trained = model.score.weight.detach().clone()
        with torch.no_grad():
            model.score.weight.zero_()
        model.load_trained(llama_path.parent / "classifier")
        assert torch.equal(model.score.weight, trained)
    reference = LlamaForSequenceClassification.from_pretrained(llama_path, num_labels=3).eval().requires_grad_(False)
    reference.config.pad_token_id = 257
    reference.score.weight.copy_(score)
    reference.score.requires_grad_(True)
    assert found == pytest.approx(losses(reference, list(reference.score.parameters()), labels=labels), abs=1e-3)


def test_a_classifiers_classes_have_names_and_its_lora_trains_as_locally(servers: Any, llama_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"id2label": {0: "low", 1: "high"}, "problem_type": "multi_label_classification"}
    labels, gradients = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), []
    with peerd.RemoteModelForSequenceClassification.from_pretrained(
        llama_path, bootstrap=servers.bootstrap, **options
    ) as model:
        local = LlamaForSequenceClassification.from_pretrained(llama_path, num_labels=2, **options)
        local.load_state_dict(model.state_dict(), strict=False)
        for each in (model, local):
            each.config.pad_token_id = 257
            assert each.config.id2label == {0: "low", 1: "high"}
            torch.manual_seed(1)
            config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
            adapted = peft.get_peft_model(each, config)
            adapted(input_ids=IDS, labels=labels).loss.backward()
            gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 2 * 8 + 1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="id2label names 2 classes of 3: name all, or leave it out"):
        peerd.RemoteModelForSequenceClassification.from_pretrained(llama_path, num_labels=3, **options)


def test_several_forwards_may_wait_for_their_backward_in_any_order(local: Any, remote: Any) -> None:
    gradients = []
    for model in (remote, local):
        leaf = model.get_input_embeddings()(IDS).detach().requires_grad_()
        losses_ = [model(inputs_embeds=leaf[row : row + 1], use_cache=False).logits.mean() for row in (0, 1)]
        losses_[0].backward()
        losses_[1].backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_a_loss_goes_back_through_a_model_that_the_program_has_forgotten(
    servers: Any, llama_path: Path, local: Any
) -> None:
    gradients, threads = [], set(threading.enumerate())
    model: Any = peerd.RemoteModelForCausalLM.from_pretrained(llama_path, bootstrap=servers.bootstrap)
    (thread,) = (each for each in threading.enumerate() if each.name == "peerd" and each not in threads)
    for each in (model, local):
        leaf = local.get_input_embeddings()(IDS).detach().requires_grad_()
        gradients.append((each(inputs_embeds=leaf, use_cache=False).logits.mean(), leaf))
    del model, each
    gc.collect()
    for loss, _ in gradients:
        loss.backward()
    torch.testing.assert_close(gradients[0][1].grad, gradients[1][1].grad, rtol=1e-3, atol=1e-6)
    del loss
    gradients.clear()
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_second_backward_and_copies_are_refused(remote: Any, tmp_path: Path) -> None:
    leaf = remote.get_input_embeddings()(IDS).detach().requires_grad_()
    loss = remote(inputs_embeds=leaf, use_cache=False).logits.mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run forward again"):
        loss.backward()
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(remote)
    with pytest.raises(ValueError, match="nothing was trained here"):
        remote.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tuning_mode": "prefix", "pre_seq_len": 3}, "one of ptune, deep_ptune"),
        ({"tuning_mode": "ptune"}, "give both"),
        ({"pre_seq_len": 3}, "give both"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str, llama_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        peerd.RemoteModelForCausalLM.from_pretrained(llama_path, **options)


def test_blocks_may_be_repeated_skipped_and_reordered(local: Any, remote: Any) -> None:
    path = [0, 2, 3, 3, 3, 1, 5, 6, 7, 5, 6, 7]

    def run(model: Any) -> list[torch.Tensor]:
        layers = model.model.layers
        custom = type(layers)([layers[index] for index in path])
        model.model.layers, model.config.num_hidden_layers = custom, len(path)
        try:
            found = [model(IDS, use_cache=False).logits]
            # Whole models number their layers' keys and values by their own index: they have no cache to compare with.
            if model is remote:
                output = model(IDS[:, :5], use_cache=True)
                cache = getattr(output, "cache", None) or output.past_key_values
                found.append(model(IDS[:, 5:], use_cache=True, past_key_values=cache).logits)
        finally:
            model.model.layers, model.config.num_hidden_layers = layers, len(layers)
        return found

    with torch.no_grad():
        (whole, continued), (expected,) = run(remote), run(local)
    torch.testing.assert_close(whole, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(continued, expected[:, 5:], rtol=1e-3, atol=1e-3)


def test_prompts_and_what_looks_between_blocks_exclude_each_other(servers: Any, llama_path: Path) -> None:
    with peerd.RemoteModelForCausalLM.from_pretrained(
        llama_path, bootstrap=servers.bootstrap, tuning_mode="ptune", pre_seq_len=3
    ) as model:
        with pytest.raises(NotImplementedError, match=r"leave out output_hidden_states.*PromptTuningConfig"):
            model(IDS, output_hidden_states=True)
        assert model.model.layers[2:4](torch.randn(1, 2, 64)).shape == (1, 2, 64)


def test_prompts_and_a_cache_with_a_prefix_exclude_each_other(servers: Any, llama_path: Path, local: Any) -> None:
    with peerd.RemoteModelForCausalLM.from_pretrained(
        llama_path, bootstrap=servers.bootstrap, tuning_mode="ptune", pre_seq_len=3
    ) as model:
        for use_cache in (True, False):
            cache = DynamicCache()
            with torch.no_grad():
                local(IDS[:1], use_cache=True, **{cache_argument(type(local).forward): cache})
                with pytest.raises(NotImplementedError, match="train one of them"):
                    model(IDS[:1], use_cache=use_cache, **{cache_argument(type(model).forward): cache})


def test_a_model_that_cannot_be_connected_leaves_no_thread_behind(
    servers: Any, llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise TypeError("no such decoder")

    monkeypatch.setattr("peerd.facade.model.find_return_type", refuse)
    before = {thread.ident for thread in threading.enumerate() if thread.name == "peerd"}
    with pytest.raises(TypeError, match="no such decoder"):
        peerd.RemoteModelForCausalLM.from_pretrained(llama_path, bootstrap=servers.bootstrap)
    assert {thread.ident for thread in threading.enumerate() if thread.name == "peerd"} == before


def test_a_head_may_compute_in_another_dtype_than_the_checkpoint(servers: Any, llama_path: Path, local: Any) -> None:
    with peerd.RemoteModelForCausalLM.from_pretrained(
        llama_path, bootstrap=servers.bootstrap, dtype="bfloat16", tuning_mode="ptune", pre_seq_len=2
    ) as model:
        assert {each.dtype for name, each in model.named_parameters() if "prompts" not in name} == {torch.bfloat16}
        output = model(IDS, labels=IDS, use_cache=False)
        output.loss.backward()
        assert output.logits.dtype is torch.bfloat16
        assert model.prompts.prefix.grad.abs().max() > 0
        assert model.prompts.prefix.grad.dtype is torch.float32
    with pytest.raises(ValueError, match="dtype='int8': the head computes in one of float32"):
        peerd.RemoteModelForCausalLM.from_pretrained(llama_path, bootstrap=servers.bootstrap, dtype="int8")


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("device_map", "say device, for the head"),
        ("torch_dtype", "say dtype, for the head"),
        ("load_in_4bit", r"servers choose how they store their blocks \(peerd --quantize\)"),
        ("token", "hub=peerd.HubSettings"),
        ("max_memory", "; leave it out. `device` and `dtype` say where its head lies"),
    ],
)
def test_options_of_local_models_are_refused_with_what_to_do_instead(
    option: str, instead: str, llama_path: Path
) -> None:
    for kind in (peerd.AutoModelForCausalLM, peerd.RemoteModelForSequenceClassification):
        with pytest.raises(TypeError, match=f"{option}: no option of a remote model.*{instead}"):
            kind.from_pretrained(llama_path, **{option: "auto"})


def test_auto_classes_open_a_directory_that_names_a_model_of_a_swarm(
    servers: Any, llama_path: Path, local: Any, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    addresses = [str(address) for address in servers.bootstrap]
    peerd.RemoteConfig(model=llama_path, bootstrap=addresses).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).bootstrap == addresses
    with AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32) as model:
        assert isinstance(model, LlamaForCausalLM)
        assert isinstance(model, peerd.RemoteModelForCausalLM)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, local(IDS).logits, rtol=1e-3, atol=1e-3)
    peerd.RemoteConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names no model: write it with peerd\.RemoteConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
