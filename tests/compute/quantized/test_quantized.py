"""Quantized blocks: as close to the plain ones as their format allows, whatever other rows are in the batch.

A block's result is compared with Transformers' own block on the dequantized weights, so that every layout of experts is
checked exactly; the distance of those weights from the plain ones is bounded separately.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine, EngineStep, RowSlice
from peerd.compute.errors import UnsupportedModelError
from peerd.compute.families.lookup import family_named
from peerd.compute.families.meta_build import build_on_meta
from peerd.compute.model.span_model import load_span
from peerd.compute.quantized.bitsandbytes_import import load_bitsandbytes
from peerd.compute.quantized.formats import FORMATS, Format
from peerd.compute.quantized.matrix import QuantizedMatrix
from peerd.compute.quantized.modules import QuantizedStack, put_quantized, quantizables
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span
from tests.compute.plain_weights import with_weights_of

TinyCheckpoint = Callable[[str], Path]

# Of a matrix's norm, for normally distributed weights: a little above what the formats do.
RELATIVE_ERROR = {"int8": 0.01, "nf4": 0.1}
# Rows that end on a scale's border and rows that do not, odd sizes, one run and several.
SHAPES = [(64, 64), (7, 48), (5, 33), (3, 100), (9, 1), (1024, 1030)]


@pytest.fixture(params=sorted(FORMATS))
def form(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


def stored(form: Format, weight: torch.Tensor, *, transposed: bool = False) -> QuantizedMatrix:
    shape = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
    values, scales = form.empty(shape, torch.device("cpu"))
    matrix = QuantizedMatrix(form, values[0], scales[0], shape, weight.dtype, transposed=transposed)
    matrix.store(weight)
    return matrix


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_keeps_its_values_within_the_formats_error(
    form: Format, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape).to(dtype)
    kept = stored(form, weight).dequantize()
    assert kept.dtype == dtype
    assert (kept.float() - weight.float()).norm() <= RELATIVE_ERROR[form.name] * weight.float().norm()


@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_int8_is_what_bitsandbytes_makes_of_it(shape: tuple[int, int]) -> None:
    load_bitsandbytes()
    torch.manual_seed(2)
    weight = torch.randn(shape)
    values, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight)
    matrix = stored(FORMATS["int8"], weight)
    assert torch.equal(matrix.values.view(shape), values)
    assert torch.equal(matrix.scales, scales)


def test_nf4_is_what_bitsandbytes_makes_of_it_where_it_is_right() -> None:
    functional = load_bitsandbytes().functional
    torch.manual_seed(3)
    weight = torch.randn(1024, 1088)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    matrix = stored(FORMATS["nf4"], weight)
    assert torch.equal(matrix.values, packed.flatten())
    assert torch.equal(matrix.dequantize(), functional.dequantize_4bit(packed, state))


def test_zeros_stay_zero(form: Format) -> None:
    weight = torch.randn(6, 64)
    weight[2:4] = 0
    kept = stored(form, weight).dequantize()
    assert torch.equal(kept[2:4], torch.zeros(2, 64))
    assert kept.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 9, 300])
def test_products_are_those_of_the_dequantized_matrix(form: Format, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    weight = torch.randn(700, 832).to(dtype)
    x = torch.randn(1, rows, 832).to(dtype)
    result = stored(form, weight).product(x)
    wanted = x.double() @ stored(form, weight.float()).dequantize().double().T
    assert result.dtype == dtype
    # One rounding of weights and one of the result, beside what sums of 832 terms lose.
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (result - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_products_with_matrices_of_any_shape(
    form: Format, shape: tuple[int, int], dtype: torch.dtype, rows: int
) -> None:
    torch.manual_seed(4)
    matrix = stored(form, torch.randn(shape).to(dtype))
    x = torch.randn(rows, shape[1]).to(dtype)
    result, wanted = matrix.product(x), x.double() @ matrix.dequantize().double().T
    assert result.shape == wanted.shape
    assert (result - wanted).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * wanted.norm()


def test_a_transposed_matrix_is_multiplied_as_its_users_write_it(form: Format) -> None:
    torch.manual_seed(5)
    weight, x = torch.randn(96, 40), torch.randn(3, 96)
    matrix = stored(form, weight, transposed=True)
    assert matrix.dequantize().shape == weight.shape
    torch.testing.assert_close(x @ matrix, x @ matrix.dequantize())
    with pytest.raises(TypeError, match="meant for x @ matrix"):
        nn.functional.linear(x, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_flow_to_the_input(form: Format, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    matrix = stored(form, torch.randn(700, 832).to(dtype))
    x = torch.randn(2, 3, 832).to(dtype).requires_grad_()
    gradient = torch.randn(2, 3, 700).to(dtype)
    matrix.product(x).backward(gradient)
    wanted = gradient.double() @ matrix.dequantize().double()
    assert x.grad is not None
    assert (x.grad - wanted).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * wanted.norm()


# `test_families.py` has all families in nf4; here are both formats, and gradients.
FAMILIES = ["llama", "mixtral", "gpt_oss", "bloom"]


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_compute_what_transformers_computes_with_the_dequantized_weights(
    tiny_checkpoint: TinyCheckpoint, name: str, form: Format
) -> None:
    with open_checkpoint(tiny_checkpoint(name)) as checkpoint:
        span = load_span(checkpoint, Span(2, 6), quantize=form.name)
        plain = with_weights_of(span, load_span(checkpoint, Span(2, 6), attention="eager"))
        torch.manual_seed(8)
        hidden = torch.randn(2, 24, 32)
        with torch.no_grad():
            torch.testing.assert_close(
                span.forward_no_cache(hidden), plain.forward_no_cache(hidden), rtol=1e-4, atol=1e-4
            )
        inputs = [hidden.clone().requires_grad_() for _ in range(2)]
        gradient = torch.randn_like(hidden)
        span.forward_no_cache(inputs[0]).backward(gradient)
        plain.forward_no_cache(inputs[1]).backward(gradient)
        assert inputs[0].grad is not None
        assert inputs[1].grad is not None
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-3)


def test_a_neighbour_in_the_batch_changes_nothing(tiny_checkpoint: TinyCheckpoint, form: Format) -> None:
    with open_checkpoint(tiny_checkpoint("mixtral")) as checkpoint:
        span = load_span(checkpoint, Span(0, 3), quantize=form.name)
    torch.manual_seed(9)
    mine, loud = torch.randn(1, 10, 32), 1000 * torch.randn(1, 10, 32)
    with torch.no_grad():
        alone = span.forward_no_cache(mine)
        beside = span.forward_no_cache(torch.cat((mine, loud)))[:1]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-5)


class Llama4Like(nn.Module):
    """What matters of Llama 4's experts: every expert gets every token, as zeros where it is not routed."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
        from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

        config = Llama4TextConfig(hidden_size=32, intermediate_size=48, num_local_experts=4)
        self.experts = Llama4TextExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.2)


def test_experts_that_get_every_token_skip_those_that_are_not_theirs(form: Format) -> None:
    torch.manual_seed(10)
    block = Llama4Like()
    wanted = Llama4Like().experts
    hidden = torch.randn(4, 6, 32)
    hidden[torch.rand(4, 6) < 0.7] = 0
    hidden[1] = 0
    for target in quantizables(block).values():
        sources = getattr(block.experts, target.name.removeprefix("experts.")).detach()
        for matrix, source in zip(put_quantized(block, target, form, torch.device("cpu")), sources, strict=True):
            matrix.store(source)
    for name, stack in block.experts.named_children():
        if isinstance(stack, QuantizedStack):
            getattr(wanted, name).data.copy_(torch.stack([matrix.dequantize() for matrix in stack]))
    with torch.no_grad():
        torch.testing.assert_close(block.experts(hidden.flatten(0, 1)), wanted(hidden.flatten(0, 1)))


#: Blocks of real proportions, so that norms and routers weigh what they weigh there.
MOE = {
    "mixtral": {"hidden_size": 512, "intermediate_size": 1792, "num_local_experts": 8},
    "qwen3_moe": {"hidden_size": 512, "moe_intermediate_size": 192, "num_experts": 32},
    "gpt_oss": {"hidden_size": 512, "intermediate_size": 512, "num_local_experts": 32},
}


@pytest.mark.parametrize("name", sorted(MOE))
def test_95_percent_of_a_block_with_experts_is_quantized(name: str) -> None:
    family = family_named(name)
    make_config: Any = family.config_type()
    config = make_config(num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2, head_dim=64, **MOE[name])
    decoder = build_on_meta(family.decoder_type(), config, torch.bfloat16)
    layer = decoder.layers[0]
    taken = [parameter.nbytes for key, parameter in layer.named_parameters() if key in quantizables(layer)]
    assert sum(taken) >= 0.95 * sum(parameter.nbytes for parameter in layer.parameters())


def test_a_layout_of_experts_that_is_not_known_is_refused() -> None:
    from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
    from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU

    with torch.device("meta"):
        block = nn.Sequential(DbrxExpertGLU(DbrxFFNConfig(hidden_size=64, ffn_hidden_size=64)), nn.Linear(64, 64))
    with pytest.raises(UnsupportedModelError, match="serve it without --quantize"):
        quantizables(block)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_engine_over_quantized_blocks_computes_what_they_compute(
    tiny_checkpoint: TinyCheckpoint, name: str, form: Format
) -> None:
    with open_checkpoint(tiny_checkpoint(name)) as checkpoint:
        span = load_span(checkpoint, Span(0, 4), quantize=form.name, attention=register_attention())
        wanted = load_span(checkpoint, Span(0, 4), quantize=form.name)
    engine = Engine(span, kv_tokens=64)
    torch.manual_seed(11)
    hidden = torch.randn(20, 32)
    engine.open("s", SessionSize(32))
    parts = []
    for seq, (start, end) in enumerate([(0, 17), (17, 18), (18, 20)]):
        engine.submit(EngineStep("s", seq, (), (RowSlice(0, start, end - start),), hidden[start:end]))
        batch = engine.plan()
        assert batch is not None
        (result,) = engine.collect(batch, engine.run(batch))
        parts.append(result.hidden)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts), wanted.forward_no_cache(hidden[None])[0], rtol=1e-3, atol=1e-3)


def test_loading_holds_less_than_one_block_beside_the_quantized_span(tmp_path: Path) -> None:
    """As the kernel counts it, in a process of its own that reads a model large enough for it to show."""
    directory = make_big_mixtral(tmp_path)
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(directory)], capture_output=True, text=True, check=True
    ).stdout
    for line, share in zip(output.splitlines(), (0.27, 0.16), strict=True):
        peak, held, kept, block = map(int, line.split())
        assert kept <= share * BIG_BLOCKS * block
        assert held <= kept + 2**20
        assert peak <= kept + block


_MEASURE = """
import ctypes
import sys
from pathlib import Path
import torch
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span

def kernel_says(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
with open_checkpoint(sys.argv[1]) as checkpoint:
    block = sum(tensor.nbytes for _, tensor in checkpoint.read(checkpoint.names_of_block(0)))
    for quantize in ("int8", "nf4"):
        # What is imported on first use is not what loading takes.
        load_span(checkpoint, Span(0, 1), quantize=quantize)
        # Nor may what was freed before hide what is taken now.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = kernel_says("VmRSS")
        span = load_span(checkpoint, Span(0, checkpoint.block_count), quantize=quantize)
        kept = sum(tensor.nbytes for tensor in [*span.parameters(), *span.buffers()])
        print(kernel_says("VmHWM") - before, kernel_says("VmRSS") - before, kept, block)
        del span
"""
BIG_BLOCKS = 4


def make_big_mixtral(directory: Path) -> Path:
    """Blocks of 29 MB each."""
    family = family_named("mixtral")
    make_config: Any = family.config_type()
    config = make_config(
        num_hidden_layers=BIG_BLOCKS,
        hidden_size=512,
        intermediate_size=512,
        num_local_experts=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=64,
    )
    model = family.causal_type()(config)
    model.save_pretrained(directory)
    return directory
