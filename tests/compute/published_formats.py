"""Writes plain matrices as publishers of quantized models store them, by hand from each format's layout.

Each function takes a parameter's name and an fp32 matrix. It returns the stored tensors and the plain matrix that they
stand for, computed from the numbers before they are packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

Stored = dict[str, torch.Tensor]
Made = tuple[Stored, torch.Tensor]
Write = Callable[[str, torch.Tensor], Made]

#: DeepSeek's blocks are 128 by 128; the tiny matrices here are smaller than one.
FP8_BLOCK = (16, 32)
GROUP = 16


def fp8_blocks(name: str, weight: torch.Tensor) -> Made:
    """DeepSeek V3, Qwen3-FP8, MiniMax-M2: a scale for each block of rows and columns, the last ones cut off."""
    rows, columns = FP8_BLOCK
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    plain = torch.empty_like(weight)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[place].abs().max() / 448.0
            stored[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            plain[place] = stored[place].float() * scales[i, j]
    return {name: stored, f"{name}_scale_inv": scales}, plain


def fp8_whole(name: str, weight: torch.Tensor) -> Made:
    """Mistral's FP8: one scale a matrix, and one for activations that is not used here."""
    scale = weight.abs().max() / 448.0
    stored = (weight / scale).to(torch.float8_e4m3fn)
    activation = f"{name.removesuffix('.weight')}.activation_scale"
    return {name: stored, f"{name}_scale_inv": scale, activation: torch.tensor(3.0)}, stored.float() * scale


def fp8_rows(name: str, weight: torch.Tensor) -> Made:
    """fbgemm_fp8 and compressed-tensors' float-quantized: a scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / 448.0
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale": scale}, stored.float() * scale


def int8_rows(name: str, weight: torch.Tensor) -> Made:
    """compressed-tensors' int-quantized (W8A8)."""
    scale = (weight.abs().amax(1, keepdim=True) / 127.0).bfloat16()
    stored = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {name: stored, f"{name}_scale": scale}, stored.float() * scale.float()


def int8_groups_with_zero(name: str, weight: torch.Tensor) -> Made:
    """compressed-tensors' int-quantized by groups, with zero points."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.amax(2) - groups.amin(2)) / 255.0
    zero = (-128 - groups.amin(2) / scale).round().clamp(-128, 127)
    values = (groups / scale[..., None] + zero[..., None]).round().clamp(-128, 127)
    plain = ((values - zero[..., None]) * scale[..., None]).flatten(1)
    stored = {name: values.flatten(1).to(torch.int8), f"{name}_scale": scale}
    return stored | {f"{name}_zero_point": zero.to(torch.int8)}, plain


def _words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers `[n, columns]` to int32 words, the first of each word in its lowest bits."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(values.long(), (0, -values.shape[1] % per_word)).unflatten(1, (-1, per_word))
    words = torch.zeros(padded.shape[:2], dtype=torch.long)
    for place in range(per_word):
        words |= padded[:, :, place] << (bits * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _four_bit_groups(weight: torch.Tensor, groups: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Values 0 to 15 `[rows, columns]`, and fp16 scales and zero points (1 to 15) `[rows, count]`."""
    scale, zero = torch.empty(len(weight), count), torch.empty(len(weight), count)
    for group in range(count):
        own = weight[:, groups == group]
        scale[:, group] = ((own.amax(1) - own.amin(1)) / 14.0).half().float()
        zero[:, group] = (-own.amin(1) / scale[:, group]).round().clamp(1, 15)
    values = (weight / scale[:, groups] + zero[:, groups]).round().clamp(0, 15)
    return values, scale, zero


def gptq(name: str, weight: torch.Tensor, *, shuffled: bool = False, less: int = 1) -> Made:
    """GPTQ, four bits. `shuffled`: columns belong to groups in no order (`desc_act`). Zero points minus `less`."""
    columns = weight.shape[1]
    count = columns // GROUP
    groups = torch.arange(columns) // GROUP
    if shuffled:
        groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    values, scale, zero = _four_bit_groups(weight, groups, count)
    stem = name.removesuffix(".weight")
    stored = {
        f"{stem}.qweight": _words(values, 4).t().contiguous(),
        f"{stem}.qzeros": _words((zero - less).t(), 4),
        f"{stem}.scales": scale.t().half().contiguous(),
        f"{stem}.g_idx": groups.int(),
    }
    return stored, (values - zero[:, groups]) * scale[:, groups]


def gptq_shuffled(name: str, weight: torch.Tensor) -> Made:
    return gptq(name, weight, shuffled=True)


def gptq_v2(name: str, weight: torch.Tensor) -> Made:
    return gptq(name, weight, less=0)


def awq(name: str, weight: torch.Tensor) -> Made:
    """AWQ, `gemm`: eight neighbouring rows a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    groups = torch.arange(weight.shape[1]) // GROUP
    values, scale, zero = _four_bit_groups(weight, groups, weight.shape[1] // GROUP)

    def packed(of: torch.Tensor) -> torch.Tensor:
        return _words(of.t().unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    stem = name.removesuffix(".weight")
    stored = {
        f"{stem}.qweight": packed(values),
        f"{stem}.qzeros": packed(zero),
        f"{stem}.scales": scale.t().half().contiguous(),
    }
    return stored, (values - zero[:, groups]) * scale[:, groups]


def packed_symmetric(name: str, weight: torch.Tensor) -> Made:
    """compressed-tensors' pack-quantized, four bits around zero, groups in no order (`actorder`)."""
    columns = weight.shape[1]
    groups = torch.arange(columns) // GROUP
    groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    scale = torch.stack([weight[:, groups == g].abs().amax(1) for g in range(columns // GROUP)], 1) / 7.0
    scale = scale.bfloat16().float()
    values = (weight / scale[:, groups]).round().clamp(-8, 7)
    stored = {
        f"{name}_packed": _words(values + 8, 4),
        f"{name}_scale": scale.bfloat16(),
        f"{name}_shape": torch.tensor(weight.shape),
        f"{name}_g_idx": groups.int(),
    }
    return stored, values * scale[:, groups]


def packed_with_zero(name: str, weight: torch.Tensor) -> Made:
    """The same with zero points, which are packed along the rows."""
    groups = torch.arange(weight.shape[1]) // GROUP
    values, scale, zero = _four_bit_groups(weight, groups, weight.shape[1] // GROUP)
    stored = {
        f"{name}_packed": _words(values, 4),
        f"{name}_scale": scale,
        f"{name}_zero_point": _words(zero.t(), 4).t().contiguous(),
        f"{name}_shape": torch.tensor(weight.shape),
    }
    return stored, (values - zero[:, groups]) * scale[:, groups]


def packed_eight_bits(name: str, weight: torch.Tensor) -> Made:
    """pack-quantized, eight bits, a scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / 127.0
    values = (weight / scale).round().clamp(-128, 127)
    stored = {
        f"{name}_packed": _words(values + 128, 8),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(weight.shape),
    }
    return stored, values * scale


_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def _nearest_fp4(values: torch.Tensor) -> torch.Tensor:
    return (values[..., None] - _FP4).abs().argmin(-1)


def nvfp4(name: str, weight: torch.Tensor) -> Made:
    """compressed-tensors' nvfp4-pack-quantized: fp8 scales of 16 values, multiplied by one for the matrix."""
    groups = weight.unflatten(1, (-1, 16))
    whole = 448.0 * 6.0 / weight.abs().max()
    scale = (groups.abs().amax(2) / 6.0 * whole).to(torch.float8_e4m3fn)
    codes = _nearest_fp4(groups / (scale.float() / whole)[..., None])
    plain = (_FP4[codes] * (scale.float() / whole)[..., None]).flatten(1)
    packed = codes.flatten(1)[:, ::2] | (codes.flatten(1)[:, 1::2] << 4)
    stored = {f"{name}_packed": packed.to(torch.uint8), f"{name}_scale": scale}
    return stored | {f"{name}_global_scale": whole.reshape(1)}, plain


def mxfp4(name: str, weight: torch.Tensor) -> Made:
    """gpt-oss: experts `[experts, columns, rows]`, stored the other way round, an exponent for each 32 columns."""
    turned = weight.transpose(1, 2)
    groups = turned.unflatten(2, (-1, 32))
    exponents = (groups.abs().amax(3) / 6.0).log2().ceil()
    codes = _nearest_fp4(groups / exponents.exp2()[..., None])
    plain = (_FP4[codes] * exponents.exp2()[..., None]).flatten(2).transpose(1, 2)
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    stored = {f"{name}_blocks": packed.to(torch.uint8), f"{name}_scales": (exponents + 127).to(torch.uint8)}
    return stored, plain


def bnb_four_bits(name: str, weight: torch.Tensor, *, kind: str = "nf4", nested: bool = True) -> Made:
    """bitsandbytes, by its own functions, as Transformers saves what they return."""
    from peerd.compute.quantized.bitsandbytes_import import load_bitsandbytes

    functional = load_bitsandbytes().functional
    options = {"quant_type": kind, "compress_statistics": nested, "blocksize": 64}
    packed, state = functional.quantize_4bit(weight, **options)
    # Flat: its kernel for the CPU mistakes the scales of rows that do not end on a scale's border.
    plain = functional.dequantize_4bit(*functional.quantize_4bit(weight.flatten(), **options)).view(weight.shape)
    stored = {name: packed}
    return stored | {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}, plain


def bnb_fp4_plain_scales(name: str, weight: torch.Tensor) -> Made:
    return bnb_four_bits(name, weight, kind="fp4", nested=False)


def bnb_int8(name: str, weight: torch.Tensor) -> Made:
    """bitsandbytes' LLM.int8: each row's largest magnitude is 127."""
    largest = weight.abs().amax(1)
    values = (weight * (127.0 / largest)[:, None]).round().to(torch.int8)
    stem = name.removesuffix(".weight")
    stored = {name: values, f"{stem}.SCB": largest, f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, values.float() * (largest / 127.0)[:, None]


def _compressed(form: str, bits: int = 8) -> dict[str, object]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits}}}
    said = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": []}
    return said | {"config_groups": groups}


#: Name -> (what writes a matrix, the `quantization_config` beside it). All but mxfp4, whose matrices are experts.
FORMATS: dict[str, tuple[Write, dict[str, object]]] = {
    "fp8 by blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": list(FP8_BLOCK)}),
    "fp8 by matrix": (fp8_whole, {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    "fbgemm fp8": (fp8_rows, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "compressed fp8": (fp8_rows, _compressed("float-quantized")),
    "compressed int8": (int8_rows, _compressed("int-quantized")),
    "compressed int8 zeros": (int8_groups_with_zero, _compressed("int-quantized")),
    "compressed int4": (packed_symmetric, _compressed("pack-quantized", 4)),
    "compressed int4 zeros": (packed_with_zero, _compressed("pack-quantized", 4)),
    "compressed packed int8": (packed_eight_bits, _compressed("pack-quantized")),
    "compressed nvfp4": (nvfp4, _compressed("nvfp4-pack-quantized", 4)),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "gptq shuffled": (gptq_shuffled, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "gptq v2": (gptq_v2, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "bitsandbytes nf4": (bnb_four_bits, {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}),
    "bitsandbytes fp4": (bnb_fp4_plain_scales, {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}),
    "bitsandbytes int8": (bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}
MXFP4_CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def config_text(config: dict[str, object], quantization: dict[str, object]) -> str:
    """A `config.json` with this quantization."""
    return json.dumps(config | {"quantization_config": quantization})
