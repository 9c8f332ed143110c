"""Prefixes of keys and values: spans compute what Transformers computes over a cache that is filled with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from peerd.compute.adapters.lora import PREFIX_K, PREFIX_V, DeepPrompt
from peerd.compute.attention.attention import register_attention
from peerd.compute.attention.prefix import widths_of_cache
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.errors import AdapterError, InvalidStepError
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.model.span_model import SpanModel, load_span
from peerd.compute.steps import EngineStep
from peerd.compute.training.pass_input import PassInput
from peerd.compute.training.tunables import Tunables
from peerd.protocol.rows import RowSlice, SessionSize
from peerd.protocol.span import Span
from tests.compute.device_turns import device_turns
from tests.compute.tiny_families import tiny_model

#: Grouped keys, windows with a cap, ALiBi, sinks, and keys that are cached before they are shared.
TINY = ("llama", "gemma2", "bloom", "gpt_oss")
CUT = (Span(0, 3), Span(3, 8))
LENGTH = 5
ROWS = (12, 7, 20)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

Prefixes = dict[tuple[int, str], torch.Tensor]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=TINY)
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Iterator[Checkpoint]:
    with open_checkpoint(tiny_checkpoint(request.param)) as found:
        yield found


def prefixes_of(model: SpanModel) -> Prefixes:
    found: Prefixes = {}
    for block, kind in enumerate(model.kinds, model.span.start):
        widths = widths_of_cache(kind, attention_interface=True)
        assert widths is not None
        for name, width in zip((PREFIX_K, PREFIX_V), widths, strict=True):
            found[block, name] = random(LENGTH, width, seed=block + len(name) * ord(name[-1]))
    return found


class Whole:
    """All blocks in Transformers' own code, row by row over a filled cache: outputs, and gradients by autograd."""

    def __init__(self, checkpoint: Checkpoint, hidden: torch.Tensor) -> None:
        model = load_span(checkpoint, Span(0, 8), dtype=torch.float32, attention="eager")
        self.leaves = {key: each.clone().requires_grad_() for key, each in prefixes_of(model).items()}
        self.hidden = hidden.clone().requires_grad_()
        self.outputs = [self._row(model, row) for row in torch.split(self.hidden, ROWS)]

    def _row(self, model: SpanModel, row: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache()
        for block, kind in enumerate(model.kinds):
            keys, values = (
                self.leaves[block, name].view(1, LENGTH, kind.kv_heads, -1).transpose(1, 2)
                for name in (PREFIX_K, PREFIX_V)
            )
            cache.update(keys, values, block)
        positions = torch.arange(LENGTH, LENGTH + len(row))[None]
        return model.forward(row[None], positions, cache)[0]


def engines_of(checkpoint: Checkpoint, *, paged: bool = False) -> list[Engine]:
    spans = [load_span(checkpoint, span, dtype=torch.float32, attention=register_attention()) for span in CUT]
    return [Engine(span, kv_tokens=256, page_tokens=4, pass_bytes=2**26, paged=paged) for span in spans]


def with_space(hidden: torch.Tensor, fill: float) -> torch.Tensor:
    """Rows with positions for the prefix before each; what these hold must not matter."""
    space = torch.full((LENGTH, hidden.shape[1]), fill)
    return torch.cat([part for row in torch.split(hidden, ROWS) for part in (space, row)])


def own_positions(packed: torch.Tensor) -> torch.Tensor:
    """The rows' own positions, without those of the prefix."""
    return torch.cat([row[LENGTH:] for row in torch.split(packed, [count + LENGTH for count in ROWS])])


@pytest.mark.parametrize("tape_bytes", [0, 2**26], ids=["computed again", "from the tape"])
def test_passes_have_the_outputs_and_gradients_of_a_filled_cache(checkpoint: Checkpoint, tape_bytes: int) -> None:
    width = checkpoint.config.hidden_size
    hidden, grad = random(sum(ROWS), width, seed=1), random(sum(ROWS), width, seed=2)
    whole = Whole(checkpoint, hidden)
    expected = torch.cat(whole.outputs)
    expected.backward(grad)
    rows = tuple(count + LENGTH for count in ROWS)
    passes = []
    packed = with_space(hidden, 0.5)
    for engine in engines_of(checkpoint):
        runner = engine.passes
        assert runner is not None
        runner.measure()
        span = runner.whole.span
        tensors = {key: each.detach() for key, each in whole.leaves.items() if span.start <= key[0] < span.end}
        given = PassInput(span, rows, packed, Tunables(tensors))
        forward = runner.forward(given, runner.plan(given), tape_bytes)
        device_turns([forward])
        passes.append((runner, given, forward))
        packed = forward.output
    torch.testing.assert_close(own_positions(packed), expected.detach(), **TOLERANCE)
    back = with_space(grad, 0.0)
    found: Prefixes = {}
    for runner, given, forward in reversed(passes):
        if forward.tape is not None:
            backward = runner.backward_of(forward.tape, back)
        else:
            backward = runner.backward(given, runner.plan(given), back)
        device_turns([backward])
        back = backward.grad
        found |= backward.gradients
    assert whole.hidden.grad is not None
    scale = float(whole.hidden.grad.abs().max())
    torch.testing.assert_close(own_positions(back) / scale, whole.hidden.grad / scale, **TOLERANCE)
    assert found.keys() == whole.leaves.keys()
    for key, leaf in whole.leaves.items():
        assert leaf.grad is not None
        scale = max(1.0, float(leaf.grad.abs().max()))
        torch.testing.assert_close(found[key] / scale, leaf.grad / scale, **TOLERANCE)


@pytest.mark.parametrize("paged", [False, True], ids=["row by row", "paged"])
def test_a_session_has_the_outputs_of_a_filled_cache_beside_one_without_a_prefix(
    checkpoint: Checkpoint, paged: bool
) -> None:
    """In steps that end inside the prefix, and one position at a time."""
    hidden = random(sum(ROWS), checkpoint.config.hidden_size, seed=1)
    with torch.no_grad():
        whole = Whole(checkpoint, hidden)
    row = torch.cat((torch.full((LENGTH, hidden.shape[1]), 0.5), hidden[: ROWS[0]]))
    engines = engines_of(checkpoint, paged=paged)
    prefixes = {key: DeepPrompt(each.detach()) for key, each in whole.leaves.items()}
    for engine in engines:
        engine.load_adapter("own", prefixes)
        for name, adapter in (("plain", ""), ("prefixed", "own")):
            engine.open(name, SessionSize(len(row)), adapter=adapter)
    found: dict[str, list[torch.Tensor]] = {"plain": [], "prefixed": []}
    for start, end in ((0, 3), (3, 8), (8, 9), (9, len(row))):
        for name, output in run(engines, row, start, end).items():
            found[name].append(output)
    plain, prefixed = (torch.cat(found[name]) for name in ("plain", "prefixed"))
    torch.testing.assert_close(prefixed[LENGTH:], whole.outputs[0], **TOLERANCE)
    with torch.no_grad():
        alone = load_span(checkpoint, Span(0, 8), dtype=torch.float32).forward_no_cache(row[None])[0]
    torch.testing.assert_close(plain, alone, **TOLERANCE)
    assert not torch.allclose(plain, prefixed, atol=0.1)


def run(engines: list[Engine], row: torch.Tensor, start: int, end: int) -> dict[str, torch.Tensor]:
    """The same positions in both sessions, in the same batches."""
    hidden = {name: row[start:end] for name in ("plain", "prefixed")}
    for engine in engines:
        for seq, (name, new) in enumerate(hidden.items()):
            engine.submit(EngineStep(name, seq, (), (RowSlice(0, start, end - start),), new))
        while batch := engine.plan():
            for result in engine.collect(batch, engine.run(batch)):
                assert result.hidden is not None
                hidden[list(hidden)[result.seq]] = result.hidden
    return hidden


def test_what_caches_no_plain_keys_takes_no_prefix(tmp_path: Path) -> None:
    tiny_model(FAMILIES["deepseek_v3"]).save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as found:
        model = load_span(found, Span(0, 2), dtype=torch.float32, attention=register_attention())
    engine = Engine(model, kv_tokens=64, pass_bytes=2**26)
    with pytest.raises(AdapterError, match="block 0 takes no prefix_k: its attention caches no plain keys and values"):
        engine.load_adapter("own", {(0, PREFIX_K): DeepPrompt(torch.ones(2, 16))})
    assert engine.passes is not None
    with pytest.raises(InvalidStepError, match="takes no prefix_v"):
        engine.passes.limits.check_parameter(Span(0, 2), 1, PREFIX_V, (2, 16))


def test_a_prefix_that_does_not_fit_is_refused(tiny_checkpoint: Callable[[str], Path]) -> None:
    with open_checkpoint(tiny_checkpoint("llama")) as found:
        engine = engines_of(found)[0]
    passes = engine.passes
    assert passes is not None
    with pytest.raises(AdapterError, match="block 1: a prefix_v 33 wide, its heads together are 32 wide"):
        engine.load_adapter("own", {(1, PREFIX_V): DeepPrompt(torch.ones(2, 33))})
    with pytest.raises(InvalidStepError, match=r"a prefix_k of shape \[1, 2, 32\] is not \[n, 32\]"):
        passes.limits.check_parameter(Span(0, 3), 1, PREFIX_K, (1, 2, 32))
    passes.measure()
    given = PassInput(Span(0, 3), (4,), torch.zeros(4, 32), Tunables({(1, PREFIX_K): torch.ones(5, 32)}))
    with pytest.raises(InvalidStepError, match="prefix_k of block 1 has 5 positions, a row only 4"):
        passes.plan(given)
