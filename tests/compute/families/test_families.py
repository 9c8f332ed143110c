"""Every family of the table, cut into a chain of engines, computes what its whole model computes in Transformers.

There is one tiny model for each family. It is saved as Transformers saves it, opened as a checkpoint, cut at 3 and 7,
and run in every way that an engine can. The whole model is run once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.capacity import block_bytes, block_costs, kv_bytes_per_token
from peerd.compute.errors import UnsupportedModelError
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.families.running_state import StateTensor
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.rows import Fork
from peerd.protocol.span import Span
from tests.compute.engine_chain import LENGTH, TOLERANCE, Chain, Part, Reference
from tests.compute.plain_weights import with_weights_of
from tests.compute.tiny_families import VARIANTS, tiny_model


@dataclass(frozen=True, slots=True)
class Tiny:
    """A tiny model: the whole one's tokens, logits and hidden states, and the chain to compare with it."""

    whole: Reference
    tokens: torch.Tensor
    logits: torch.Tensor
    chain: Chain


@pytest.fixture(scope="module", params=[*sorted(FAMILIES), *VARIANTS])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """A tiny model's checkpoint, with what the whole model computes."""
    name, fields = VARIANTS.get(request.param, (request.param, None))
    model = tiny_model(FAMILIES[name], fields)
    folder: Path = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    with open_checkpoint(folder) as checkpoint:
        seen, tokens, logits = run_whole(model, checkpoint)
        whole = Reference(checkpoint, *seen)
        yield Tiny(whole, tokens, logits, Chain(whole, batch_tokens=24))


def run_whole(model: Any, checkpoint: Checkpoint) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """What enters the first block and leaves the last, the tokens, and the logits."""
    family = checkpoint.family
    decoder = model.base_model.get_submodule(family.decoder_at)
    layers = getattr(decoder, family.layers)
    seen: list[torch.Tensor] = []
    layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
    )
    layers[-1].register_forward_hook(lambda _, __, output: seen.append(output[0] if type(output) is tuple else output))
    tokens = torch.randint(3, 96, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.std() > 0.05, "a model whose logits are all alike would prove nothing"
    return seen, tokens, logits


def test_a_chain_of_engines_equals_the_whole_model(tiny: Tiny) -> None:
    chain = tiny.chain
    chain.open("a", max_rows=3)
    chain.open("b")
    chain.open("c")
    # Prompts of different lengths, in chunks of what a batch takes, past every window.
    chain.check(Part("a", 0, 0, 0, 19), Part("b", 0, 1, 0, 37), Part("c", 0, 2, 0, 3))
    for turn in range(2):
        chain.check(Part("c", 0, 2, 3 + turn, 1), Part("b", 0, 1, 37 + turn, 1), Part("a", 0, 0, 19 + turn, 1))
    # A prompt beside a token.
    chain.check(Part("c", 0, 2, 5, 17), Part("a", 0, 0, 21, 1))
    # Astray, back, and along the right way again.
    chain.run(Part("a", 0, 1, 22, 4))
    chain.check(Part("a", 0, 0, 20, 3))
    # A copy goes its own way, and the first its own.
    chain.check(Part("a", 2, 0, 23, 2), ops=[Fork(0, 2, 23)])
    chain.run(Part("a", 2, 1, 25, 2))
    chain.check(Part("a", 0, 0, 23, 5), Part("b", 0, 1, 39, 1))


def test_without_a_cache_a_chain_equals_the_whole_model(tiny: Tiny) -> None:
    hidden = tiny.whole.inputs
    for engine in tiny.chain.engines:
        hidden = engine.forward(hidden)
    torch.testing.assert_close(hidden, tiny.whole.outputs, **TOLERANCE)


def test_the_head_embeds_and_answers_as_the_whole_model(tiny: Tiny) -> None:
    whole = tiny.whole
    head = load_head(whole.checkpoint)
    torch.testing.assert_close(head.embed(tiny.tokens[0]), whole.inputs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.logits(whole.outputs[0]), tiny.logits[0], **TOLERANCE)


class _Recorder:
    """A cache that keeps nothing but the shapes it was given."""

    is_compileable = False
    is_sliding = (False,)

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}
        #: Of running states: by block, the shape of the convolution's, then that of the recurrence's.
        self.states: dict[int, list[StateTensor]] = {}
        self.layers = defaultdict(lambda: self)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
        heads, _, key_dim = keys.shape[1:]
        assert values.shape[1] == heads
        self.shapes[layer] = (heads, key_dim, values.shape[-1])
        return keys, values

    def get_seq_length(self, _layer: int = 0) -> int:
        return 0

    get_query_offset = get_seq_length
    record_past = False

    def has_previous_state(self, *_: Any) -> bool:
        return False

    def is_recording_past(self, _layer: int) -> bool:
        return False

    def get_conv_state(self, _layer: int, **_: Any) -> None:
        return None

    def get_recurrent_state(self, _layer: int, **_: Any) -> None:
        return None

    def update_conv_state(
        self, new: torch.Tensor, layer: int, conv_kernel_size: int | None = None, **_: Any
    ) -> torch.Tensor:
        self.states[layer] = [StateTensor((new.shape[1], conv_kernel_size or new.shape[2]))]
        return new

    def update_recurrent_state(self, new: torch.Tensor, layer_idx: int, **_: Any) -> torch.Tensor:
        self.states[layer_idx].append(StateTensor(tuple(new.shape[1:]), in_fp32=True))
        return new

    def get_mask_sizes(self, length: int, _layer: int) -> tuple[int, int]:
        return length, 0


def test_sizes_follow_from_the_configuration(tiny: Tiny) -> None:
    checkpoint = tiny.whole.checkpoint
    kinds: list[tuple[int, int, int]] = []
    sizes: list[int] = []
    for span in tiny.chain.spans:
        recorder = _Recorder()
        with torch.no_grad():
            span(torch.zeros(1, 5, span.hidden_size), torch.arange(5)[None], recorder, rope_lengths=5)
        own = [(kind.kv_heads, kind.key_dim, kind.value_dim) for kind in span.kinds]
        assert [recorder.shapes.get(layer, (0, 0, 0)) for layer in range(len(own))] == own
        states = [list(kind.state.tensors) if kind.state is not None else [] for kind in span.kinds]
        assert [recorder.states.get(layer, []) for layer in range(len(own))] == states
        # A block without keys and values counts positions by the width of what it logs, or by one number.
        counted = [(1, kind.state.width if kind.state else 1, 0) for kind in span.kinds]
        kinds += [shape if any(shape) else slot for shape, slot in zip(own, counted, strict=True)]
        sizes += [sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in span.layers]
    assert kv_bytes_per_token(checkpoint, torch.float16) == max(h * (k + v) for h, k, v in kinds) * 2
    assert block_bytes(checkpoint, torch.float32) == max(sizes)


def test_quantized_blocks_take_what_was_counted_and_compute_what_they_hold(tiny: Tiny) -> None:
    checkpoint = tiny.whole.checkpoint
    if checkpoint.family.model_type in NOT_QUANTIZED:
        with pytest.raises(UnsupportedModelError, match="serve it without --quantize"):
            load_span(checkpoint, Span(2, 3), quantize="nf4")
        return
    span = load_span(checkpoint, Span(2, 5), quantize="nf4", attention="eager")
    sizes = [sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in span.layers]
    assert sizes == [cost.n_bytes for cost in block_costs(checkpoint, torch.float32, "nf4")[2:5]]
    plain = with_weights_of(span, load_span(checkpoint, Span(2, 5), attention="eager"))
    hidden = tiny.whole.inputs[:2]
    with torch.no_grad():
        computed, wanted = span.forward_no_cache(hidden), plain.forward_no_cache(hidden)
    assert (computed - wanted).norm() <= 1e-4 * wanted.norm()


# Its experts lie in two dimensions.
NOT_QUANTIZED = {"dbrx"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("deepseek_v3", torch.bfloat16), ("flint", torch.bfloat16), ("gpt_oss", torch.float16), ("llama", torch.float16)],
)
def test_what_transformers_keeps_in_fp32_is_kept_in_fp32(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = FAMILIES[name]
    tiny_model(family).save_pretrained(tmp_path)
    whole = family.causal_type().from_pretrained(tmp_path, dtype=dtype)
    layers = getattr(whole.base_model, family.layers)[3:7]
    with open_checkpoint(tmp_path) as checkpoint:
        span = load_span(checkpoint, Span(3, 7), dtype=dtype)
        head = load_head(checkpoint, dtype=dtype)
    assert dtypes(span.layers) == dtypes(layers)
    assert dtypes(getattr(head.model.base_model, family.norm)) == dtypes(getattr(whole.base_model, family.norm))
    assert (torch.float32 in dtypes(layers).values()) == (name != "llama")
    with torch.no_grad():
        assert span.forward_no_cache(torch.ones(1, 3, span.hidden_size, dtype=dtype)).isfinite().all()


def dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in module.state_dict().items()}
