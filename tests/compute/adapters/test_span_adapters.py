"""Adapters beside each other in one batch, on cut spans, compute what peft computes with each alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peerd.compute.adapters.file import open_adapter
from peerd.compute.adapters.lora import PROMPT, DeepPrompt, Lora, LoraPair
from peerd.compute.adapters.span_adapters import SpanAdapters
from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.errors import AdapterError, InvalidStepError, UnknownAdapterError
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.model.span_model import load_span
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import RowSlice, SessionSize
from peerd.protocol.span import Span
from tests.compute.tiny_families import tiny_model

CUT = (Span(0, 3), Span(3, 7), Span(7, 8))
LENGTH = 24
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
# Made by the families' own recipe rather than the one of `tiny_checkpoint`.
BY_FAMILY = ("gpt2", "opt", "deepseek_v3")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

#: Tiny model -> what peft is asked for, one adapter each.
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
        {
            "r": 2,
            "target_modules": ["q_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"down_proj": 3, r"^model\.layers\.4\.self_attn\.q_proj": 5},
            "alpha_pattern": {"layers.2.self_attn.q_proj": 20},
        },
    ),
    "qwen3": (
        {"r": 3, "target_modules": ATTENTION, "layers_to_transform": [0, 2, 3, 6]},
        {"r": 4, "target_modules": r".*\.[4-7]\.(self_attn|mlp)\.(v|up)_proj"},
    ),
    # With nothing said of experts: an adapter for attention alone.
    "mixtral": ({"r": 4, "target_modules": ATTENTION}, {"r": 2, "target_modules": ["q_proj"], "lora_alpha": 3}),
    # Fused projections are one layer, in files as in models.
    "phi3": ({"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}, {"r": 2, "target_modules": ["o_proj"]}),
    # Its linear layers keep their weights the other way round.
    "gpt2": (
        {"r": 4, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
        {"r": 2, "target_modules": "all-linear"},
    ),
    # Its blocks lie deeper in the model.
    "opt": ({"r": 4, "target_modules": ["q_proj", "fc2"]}, {"r": 2, "target_modules": ["v_proj"]}),
    # Queries and keys of lower rank than the model's width.
    "deepseek_v3": (
        {"r": 4, "target_modules": ["q_a_proj", "kv_a_proj_with_mqa"]},
        {"r": 2, "target_modules": ["o_proj"]},
    ),
    "bloom": ({"r": 4, "target_modules": ["query_key_value"]}, {"r": 2, "target_modules": "all-linear"}),
}


@dataclass
class Reference:
    """A tiny model under peft: what enters its first block, and what leaves its last under each adapter or none."""

    checkpoint: Checkpoint
    inputs: torch.Tensor
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)

    def lora(self, name: str) -> Lora:
        with open_adapter(self.folders[name], self.checkpoint.family) as file:
            return file.read()


def make_reference(folder: Path, configs: Sequence[Mapping[str, Any]], where: Path) -> Reference:
    with warnings.catch_warnings():
        # These warnings come from peft itself, with a newer Transformers than it knows.
        warnings.simplefilter("ignore")
        return _make_reference(folder, configs, where)


def _make_reference(folder: Path, configs: Sequence[Mapping[str, Any]], where: Path) -> Reference:
    from peft import LoraConfig, get_peft_model

    checkpoint = open_checkpoint(folder)
    family = checkpoint.family
    model = family.causal_type().from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    layers = getattr(model.base_model.get_submodule(family.decoder_at), family.layers)
    layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
    )
    layers[-1].register_forward_hook(lambda _, __, output: seen.append(output[0] if type(output) is tuple else output))
    tokens = torch.randint(3, model.config.vocab_size, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=tokens)
    reference = Reference(checkpoint, seen[0], {"": seen[1]})
    for name, config in zip("ab", configs, strict=True):
        torch.manual_seed(ord(name))
        adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **config), adapter_name=name)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.15)
        seen.clear()
        with torch.no_grad():
            adapted(input_ids=tokens)
        reference.outputs[name] = seen[1]
        adapted.save_pretrained(where, selected_adapters=[name])
        reference.folders[name] = where / name
        model = adapted.unload()
    return reference


@pytest.fixture(scope="module")
def references(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Reference]]:
    found: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in found:
            where = tmp_path_factory.mktemp("adapters")
            if name in BY_FAMILY:
                tiny_model(FAMILIES[name]).save_pretrained(where / "model")
                folder = where / "model"
            else:
                folder = tiny_checkpoint(name)
            found[name] = make_reference(folder, ADAPTERS[name], where)
        return found[name]

    yield get
    for reference in found.values():
        reference.checkpoint.close()


def make_engines(reference: Reference, spans: Sequence[Span] = CUT) -> list[Engine]:
    return [
        Engine(
            load_span(reference.checkpoint, span, dtype=torch.float32, attention=register_attention()),
            kv_tokens=512,
            page_tokens=4,
            batch_tokens=64,
        )
        for span in spans
    ]


@dataclass(frozen=True)
class Part:
    """New positions of a session, of the reference's row `text`."""

    session: str
    text: int
    start: int
    count: int


def run(engines: Sequence[Engine], reference: Reference, parts: Sequence[Part]) -> list[torch.Tensor]:
    """One step each, all in the same batches."""
    hidden = [reference.inputs[part.text, part.start : part.start + part.count] for part in parts]
    for engine in engines:
        for seq, (part, new) in enumerate(zip(parts, hidden, strict=True)):
            engine.submit(EngineStep(part.session, seq, (), (RowSlice(0, part.start, part.count),), new))
        results = {}
        while batch := engine.plan():
            for result in engine.collect(batch, engine.run(batch)):
                results[result.seq] = result.hidden
        hidden = [results[seq] for seq in range(len(parts))]
    return hidden


def open_sessions(engines: Sequence[Engine], adapters: Mapping[str, str]) -> None:
    for engine in engines:
        for session, adapter in adapters.items():
            engine.open(session, SessionSize(LENGTH), adapter=adapter)


def check(reference: Reference, part: Part, adapter: str, result: torch.Tensor) -> None:
    expected = reference.outputs[adapter][part.text, part.start : part.start + part.count]
    torch.testing.assert_close(result, expected, **TOLERANCE)


def load_all(engines: Sequence[Engine], reference: Reference) -> None:
    for name in reference.folders:
        lora = reference.lora(name)
        for engine in engines:
            engine.load_adapter(name, lora)


@pytest.mark.parametrize("family", sorted(ADAPTERS))
def test_two_adapters_and_none_share_batches_and_each_is_as_in_peft(references, family):
    reference = references(family)
    assert not torch.allclose(reference.outputs["a"], reference.outputs["b"], atol=0.1)
    assert not torch.allclose(reference.outputs["a"], reference.outputs[""], atol=0.1)
    engines = make_engines(reference)
    load_all(engines, reference)
    # Two sessions under `a`, apart from each other in the batch.
    sessions = {"none": "", "first": "a", "second": "b", "third": "a"}
    open_sessions(engines, sessions)
    for start, count in ((0, 9), (9, 1), (10, 1), (11, 5)):
        parts = [Part(session, number % 3, start, count) for number, session in enumerate(sessions)]
        for part, result in zip(parts, run(engines, reference, parts), strict=True):
            check(reference, part, sessions[part.session], result)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_quantized_layers_are_adapted_too(references, quantize):
    """What an adapter adds is not quantized: the error stays that of the weights."""
    reference = references("llama")
    span = Span(3, 4)
    quantized = load_span(reference.checkpoint, span, dtype=torch.float32, quantize=quantize)
    exact = load_span(reference.checkpoint, span, dtype=torch.float32)
    lora = {key: LoraPair(pair.a, pair.b, 8 * pair.scale) for key, pair in reference.lora("a").items()}
    results = []
    for model in (quantized, exact):
        adapters = SpanAdapters(model)
        adapters.load("a", lora)
        with torch.inference_mode():
            plain = model.forward_no_cache(reference.inputs)
            with adapters.under("a"):
                results.append((plain, model.forward_no_cache(reference.inputs)))
    (plain, adapted), (exact_plain, exact_adapted) = results
    assert not torch.equal(plain, exact_plain)
    moved = (exact_adapted - exact_plain).norm()
    assert moved > 2 * (plain - exact_plain).norm()
    assert (adapted - exact_adapted).norm() < 0.3 * moved


@pytest.mark.parametrize("at_once", [False, True])
def test_many_adapters_in_one_batch_are_what_each_is_alone(references, monkeypatch, at_once):
    """One after the other, as a CPU runs them, or as one product, as a GPU does."""
    monkeypatch.setattr("peerd.compute.adapters.routing._pays_at_once", lambda *_: at_once)
    reference = references("llama")
    engines = make_engines(reference)
    names = {"": ""}
    for number in range(6):
        lora = reference.lora("ab"[number % 2])
        name = f"adapter {number}"
        names[name] = "ab"[number % 2]
        for engine in engines:
            engine.load_adapter(name, lora)
    open_sessions(engines, {name: name for name in names})
    for start, count in ((0, 4), (4, 1)):
        parts = [Part(name, number % 3, start, count) for number, name in enumerate(names)]
        for part, result in zip(parts, run(engines, reference, parts), strict=True):
            check(reference, part, names[part.session], result)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("many", [1, 5])
def test_what_overflows_under_one_adapter_reaches_no_other_session(references, monkeypatch, many, at_once):
    monkeypatch.setattr("peerd.compute.adapters.routing._pays_at_once", lambda *_: at_once)
    reference = references("llama")
    (engine,) = make_engines(reference, CUT[:1])
    engine.load_adapter("a", reference.lora("a"))
    wild = {key: LoraPair(pair.a * 1e38, pair.b * 1e38, 1e8) for key, pair in reference.lora("a").items()}
    names = [f"wild {number}" for number in range(many)]
    for name in names:
        engine.load_adapter(name, wild)
    sessions = {"tame": "a", "plain": ""} | {name: name for name in names}
    open_sessions([engine], {"alone": "a", "alone too": ""})
    parts = [Part("alone", 0, 0, 5), Part("alone too", 0, 0, 5)]
    alone = run([engine], reference, parts)
    open_sessions([engine], sessions)
    results = run([engine], reference, [Part(name, 0, 0, 5) for name in sessions])
    torch.testing.assert_close(results[:2], alone, rtol=1e-5, atol=1e-5)
    assert all(result is None for result in results[2:])


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_deep_prompt_is_added_to_the_first_positions_of_its_sessions_rows_only(references, family):
    """Beside a session without, in pieces that end inside the prompt, and over cut spans."""
    reference = references(family)
    width = reference.inputs.shape[2]
    draw = torch.Generator().manual_seed(5)
    prompts = {(block, PROMPT): DeepPrompt(torch.randn(5, width, generator=draw)) for block in (0, 2, 3, 6)}
    engines = make_engines(reference)
    for engine in engines:
        engine.load_adapter("own", prompts)
    open_sessions(engines, {"prompted": "own", "plain": ""})
    whole = load_span(reference.checkpoint, Span(0, 8), dtype=torch.float32)
    handles = [
        whole.layers[block].register_forward_pre_hook(_adds(prompt.values), with_kwargs=True)
        for (block, _), prompt in prompts.items()
    ]
    with torch.inference_mode():
        expected = whole.forward_no_cache(reference.inputs[1:2])[0]
    for handle in handles:
        handle.remove()
    assert not torch.allclose(expected, reference.outputs[""][1], atol=0.1)
    for start, count in ((0, 3), (3, 4), (7, 1), (8, 6)):
        parts = [Part("plain", 0, start, count), Part("prompted", 1, start, count)]
        plain, prompted = run(engines, reference, parts)
        check(reference, parts[0], "", plain)
        torch.testing.assert_close(prompted, expected[start : start + count], **TOLERANCE)
    for engine in engines:
        engine.close("prompted")
        engine.unload_adapter("own")
        assert not any(module._forward_pre_hooks for module in engine._runner._whole.layers)
    narrow = {(0, PROMPT): DeepPrompt(torch.ones(2, width - 1))}
    with pytest.raises(AdapterError, match=f"block 0: a deep prompt {width - 1} wide, the model is {width} wide"):
        engines[0].load_adapter("narrow", narrow)


def _adds(values: torch.Tensor) -> Any:
    def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = torch.cat((hidden[:, : len(values)] + values, hidden[:, len(values) :]), 1)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    return add


def test_adapters_come_and_go_while_sessions_run(references):
    reference = references("llama")
    engines = make_engines(reference)
    open_sessions(engines, {"old": ""})
    old = [Part("old", 0, start, 4) for start in range(0, 16, 4)]
    check(reference, old[0], "", run(engines, reference, old[:1])[0])
    load_all(engines, reference)
    open_sessions(engines, {"new": "a"})
    new = [Part("new", 1, start, 4) for start in range(0, 8, 4)]
    for first, second in zip(old[1:3], new, strict=True):
        results = run(engines, reference, [first, second])
        check(reference, first, "", results[0])
        check(reference, second, "a", results[1])
    for engine in engines:
        engine.close("new")
        engine.unload_adapter("a")
        assert engine.adapters == {"b"}
        engine.unload_adapter("b")
        assert not any(module._forward_hooks for module in engine._runner._whole.layers.modules())
    check(reference, old[3], "", run(engines, reference, old[3:])[0])


def test_only_the_blocks_of_a_span_are_read_and_kept(references):
    reference = references("llama")
    with open_adapter(reference.folders["a"], reference.checkpoint.family) as file:
        before = file._tensors.bytes_read
        lora = file.read(Span(3, 5))
        assert {block for block, _ in lora} == {3, 4}
        assert file._tensors.bytes_read - before == file.n_bytes(Span(3, 5))
        assert file.n_bytes() == 4 * file.n_bytes(Span(3, 5))
    model = load_span(reference.checkpoint, Span(3, 5), dtype=torch.bfloat16)
    adapters = SpanAdapters(model)
    adapters.load("whole", reference.lora("a"))
    assert adapters.n_bytes == sum(pair.n_bytes for pair in lora.values()) // 2


def test_a_session_asks_for_an_adapter_that_is_there_or_hears_which_are(references):
    reference = references("llama")
    (engine,) = make_engines(reference, CUT[:1])
    with pytest.raises(UnknownAdapterError, match=r"no adapter 'a' here; there is none$"):
        engine.open("session", SessionSize(LENGTH), adapter="a")
    load_all([engine], reference)
    engine.load_adapter("~somebody's own", {})
    with pytest.raises(UnknownAdapterError, match=r"there is a, b$"):
        engine.open("session", SessionSize(LENGTH), adapter="c")
    engine.open("session", SessionSize(LENGTH))
    with pytest.raises(UnknownAdapterError):
        engine.use_adapter("session", "c")
    engine.use_adapter("session", "a")
    run([engine], reference, [Part("session", 0, 0, 2)])
    with pytest.raises(InvalidStepError):
        engine.use_adapter("session", "b")


def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(references):
    reference = references("mixtral")
    (engine,) = make_engines(reference, CUT[:1])
    narrow = LoraPair(torch.zeros(2, 31), torch.zeros(64, 2), 1.0)
    for key, reason in (
        ((1, "self_attn.q_proj"), "block 1: self_attn.q_proj maps 32 to 32 values"),
        ((1, "mlp.experts"), "block 1 has no linear layer mlp.experts"),
        ((1, "mlp.gate"), "no linear layer"),
        ((0, ""), "no linear layer"),
    ):
        with pytest.raises(AdapterError, match=reason):
            engine.load_adapter("wrong", {**reference.lora("a"), key: narrow})
    assert engine.adapters == frozenset()
    engine.load_adapter("a", reference.lora("a"))
    with pytest.raises(AdapterError, match="already"):
        engine.load_adapter("a", reference.lora("a"))


def test_values_that_the_span_cannot_hold_are_refused(references):
    model = load_span(references("llama").checkpoint, Span(3, 4), dtype=torch.float16)
    adapters = SpanAdapters(model)
    pair = LoraPair(torch.zeros(1, 32), torch.full((64, 1), 1e5), 1.0)
    with pytest.raises(AdapterError, match=r"self_attn\.q_proj has a value that is not finite in torch\.float16"):
        adapters.load("a", {(3, "self_attn.q_proj"): pair})
    assert adapters.names == frozenset()


def test_what_expands_cached_latents_cannot_be_adapted(references):
    (engine,) = make_engines(references("deepseek_v3"), CUT[:1])
    with pytest.raises(AdapterError, match=r"block 1 has no linear layer self_attn\.kv_b_proj that"):
        engine.load_adapter("a", {(1, "self_attn.kv_b_proj"): LoraPair(torch.zeros(2, 16), torch.zeros(96, 2), 1.0)})


def test_a_layer_that_does_not_see_every_position_once_cannot_be_adapted(references):
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + self.inner(x.flip(1))

    reference = references("llama")
    model = load_span(reference.checkpoint, Span(3, 5), dtype=torch.float32)
    layer: Any = model.layers[0]
    layer.self_attn.q_proj = Twice(layer.self_attn.q_proj)
    pair = LoraPair(torch.zeros(2, 32), torch.zeros(64, 2), 1.0)
    with pytest.raises(AdapterError, match=r"no linear layer self_attn\.q_proj\.inner"):
        SpanAdapters(model).load("a", {(3, "self_attn.q_proj.inner"): pair})
