"""The published quantizations that are read: which stored tensors make one parameter, and what is refused.

A configuration's `quantization_config` names the method; the names and shapes of the stored tensors say the rest. A
wrong guess would compute nonsense without an error. So every method, option and piece that is not listed here is
refused, and so are scales that belong to no parameter, whatever the configuration says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peerd.compute.checkpoint.packed.code_rows import Words, columns_first, rows_first
from peerd.compute.checkpoint.packed.four_bits import bnb_four_bit_rows, mxfp4_rows, nvfp4_rows
from peerd.compute.checkpoint.packed.pieces import Pieces, PlainRows, plain
from peerd.compute.checkpoint.packed.scaled import bnb_int8_rows, scaled_rows
from peerd.compute.checkpoint.packed.words import WORD_BITS, GptqRows, awq_rows, gptq_rows, packed_rows
from peerd.compute.errors import UnsupportedModelError
from peerd.compute.families.family import Family

# Stored beside fp8 and int8 weights: scales by which the formats' own kernels round activations and the KV cache. We
# round neither.
_UNUSED = tuple(
    f".{name}_scale" for name in ("input", "activation", "output", "k", "v", "q", "k_proj.output", "v_proj.output")
)
# The names of the pieces of quantized weights, in every format that we have seen.
_PIECE = re.compile(
    r"(_scale_inv|weight_scale(_2)?|weight_packed|weight_shape|weight_zero_point|weight_g_idx|weight_global_scale"
    r"|input_scale|\.(scales|qweight|qzeros|g_idx|SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map)"
    r"|_blocks|_scales|quant_state\.bitsandbytes__\w+)$"
)
# Families whose linear layers are Conv1D, with transposed matrices: the methods treat these in different ways.
_TURNED = ("gpt2",)


@dataclass(frozen=True, slots=True)
class Packing:
    """How the weights of one checkpoint are quantized.

    `endings`: the end of a piece's name -> (the end of the parameter's name, the piece's role). The tensor with the
    parameter's own name has the role `values`. A parameter is quantized if it has a piece with the role `key`. `rows`
    makes a matrix from the pieces; with `turned` the parameter is the transpose of that matrix.
    """

    name: str
    endings: Mapping[str, tuple[str, str]]
    key: str
    rows: Callable[[Pieces], PlainRows]
    turned: bool = False
    #: How its integers can be kept; None if they can only be dequantized.
    words: Words | None = None

    def sort(self, stored_names: Iterable[str]) -> dict[str, dict[str, str]]:
        """The quantized parameters by name, each with the stored names of its pieces by role."""
        names = tuple(stored_names)
        found: dict[str, dict[str, str]] = {}
        for name in names:
            if (place := self._place(name)) is not None:
                parameter, role = place
                found.setdefault(parameter, {})[role] = name
        there = set(names)
        for parameter, pieces in found.items():
            if parameter in there:
                pieces.setdefault("values", parameter)
        return {parameter: pieces for parameter, pieces in found.items() if self.key in pieces and "values" in pieces}

    def is_unused(self, stored_name: str) -> bool:
        """Whether the tensor is a scale for rounding activations or the KV cache, which we do not round."""
        return stored_name.endswith(_UNUSED)

    def unpack(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        """The parameter: a matrix, or the experts' matrices stacked. Raises CheckpointError."""
        if not self._stacked(pieces):
            return self._matrix(pieces, dtype)
        slices = self.unpack_slices(pieces, dtype)
        first = next(slices, None)
        if first is None:
            raise pieces.wrong("has no experts")
        whole = torch.empty(len(pieces.tensors["values"]), *first.shape, dtype=dtype)
        whole[0] = first
        for index, matrix in enumerate(slices, 1):
            whole[index] = matrix
        return whole

    def unpack_slices(self, pieces: Pieces, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The experts' matrices, one by one."""
        if not self._stacked(pieces):
            yield from self._matrix(pieces, dtype)
            return
        counts = {len(tensor) if tensor.ndim else 0 for tensor in pieces.tensors.values()}
        if len(counts) != 1:
            raise pieces.wrong("has pieces for different numbers of experts")
        for index in range(counts.pop()):
            yield self._matrix(pieces.of_expert(index), dtype)

    def _place(self, stored_name: str) -> tuple[str, str] | None:
        for ending, (instead, role) in self.endings.items():
            if stored_name.endswith(ending):
                return stored_name.removesuffix(ending) + instead, role
        return None

    def _stacked(self, pieces: Pieces) -> bool:
        return pieces.tensors["values"].ndim == (4 if self.name == "mxfp4" else 3)

    def _matrix(self, pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        matrix = plain(self.rows(pieces), dtype)
        return matrix.t().contiguous() if self.turned else matrix


def packing_of(said: Mapping[str, Any] | None, family: Family, where: object) -> Packing | None:
    """The packing that a configuration's `quantization_config` names. Raises UnsupportedModelError that names
    `where`.
    """
    if said is None:
        return None
    method = said["quant_method"]
    make = _METHODS.get(str(method))
    if make is None:
        raise UnsupportedModelError(f"{where}: its weights are quantized by {method}, which we do not read")
    if family.model_type in _TURNED:
        raise UnsupportedModelError(f"{where}: quantized weights of a {family.model_type} are not read")
    return make(_Said(said, f"{where}: its weights are quantized by {method}"))


def refuse_stray_pieces(stored_names: Iterable[str], layers: str, where: object) -> None:
    """Raise UnsupportedModelError if pieces of quantized weights are among these names: their numbers would be
    misread.
    """
    for name in stored_names:
        if f"{layers}." in name and _PIECE.search(name):
            raise UnsupportedModelError(
                f"{where}: {name} belongs to quantized weights, and its configuration does not say how they are to be"
                " read"
            )


@dataclass(frozen=True, slots=True)
class _Said:
    """A `quantization_config`, each option of which must be checked."""

    fields: Mapping[str, Any]
    where: str

    def refuse(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.where}: {why}")

    def one_of(self, field: str, allowed: tuple[object, ...], default: object) -> Any:
        value = self.fields.get(field, default)
        if not any(value is known or (type(value) is type(known) and value == known) for known in allowed):
            listed = ", ".join(str(known) for known in allowed)
            raise self.refuse(f"{field} is {value!r}; peerd reads {listed}")
        return value


_SCALED = {"_scale_inv": ("", "scale"), ".weight_scale": (".weight", "scale")}


def _fp8(said: _Said) -> Packing:
    size = said.fields.get("weight_block_size")
    is_pair = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if size is not None and not is_pair:
        raise said.refuse(f"weight_block_size is {size!r}")
    block = (size[0], size[1]) if size is not None else None
    return Packing("fp8", _SCALED, "scale", lambda pieces: scaled_rows(pieces, "fp8", block=block))


def _mxfp4(said: _Said) -> Packing:
    endings = {"_blocks": ("", "values"), "_scales": ("", "scale")}
    return Packing("mxfp4", endings, "scale", mxfp4_rows, turned=True)


_WORDS = {
    ".qweight": (".weight", "values"),
    ".qzeros": (".weight", "zero"),
    ".scales": (".weight", "scale"),
    ".g_idx": (".weight", "groups"),
}


def _awq(said: _Said) -> Packing:
    said.one_of("bits", (4,), 4)
    said.one_of("version", ("gemm", "GEMM"), "gemm")
    return Packing("awq", _WORDS, "scale", awq_rows, words=Words("awq", 4, columns_first(1), awq_rows))


def _gptq(said: _Said) -> Packing:
    bits = said.one_of("bits", (2, 4, 8), None)
    form = said.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")

    def rows(pieces: Pieces) -> GptqRows:
        return gptq_rows(pieces, bits, stored_one_less=form != "gptq_v2")

    # Otherwise only the pieces themselves would say whether their columns are in order.
    in_order = said.fields.get("desc_act") is False
    words = Words("gptq", bits, columns_first(WORD_BITS // bits), rows) if in_order else None
    return Packing("gptq", _WORDS, "scale", rows, words=words)


def _bitsandbytes(said: _Said) -> Packing:
    if said.fields.get("load_in_8bit"):
        endings = {".SCB": (".weight", "scale"), ".weight_format": (".weight", "format")}
        words = Words("bitsandbytes int8", 8, rows_first(1), bnb_int8_rows)
        return Packing("bitsandbytes int8", endings, "scale", bnb_int8_rows, words=words)
    # Otherwise the bytes are stored as if they were numbers of another dtype.
    said.one_of("bnb_4bit_quant_storage", ("uint8",), "uint8")
    kind = said.one_of("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
    endings = {
        ".nested_absmax": ("", "nested_scale"),
        ".nested_quant_map": ("", "nested_table"),
        ".absmax": ("", "scale"),
        ".quant_map": ("", "table"),
        f".quant_state.bitsandbytes__{kind}": ("", "state"),
    }
    return Packing(f"bitsandbytes {kind}", endings, "state", bnb_four_bit_rows)


_COMPRESSED = {
    "weight_packed": ("weight", "values"),
    "weight_scale": ("weight", "scale"),
    "weight_zero_point": ("weight", "zero"),
    "weight_shape": ("weight", "shape"),
    "weight_g_idx": ("weight", "groups"),
    "weight_global_scale": ("weight", "global_scale"),
}
_COMPRESSED_ROWS: Mapping[str, Callable[[Pieces], PlainRows]] = {
    "float-quantized": lambda pieces: scaled_rows(pieces, "fp8"),
    "int-quantized": lambda pieces: scaled_rows(pieces, "int8"),
    "naive-quantized": lambda pieces: scaled_rows(pieces, "fp8", "int8"),
    "nvfp4-pack-quantized": nvfp4_rows,
    "pack-quantized": packed_rows,
}


def _compressed_tensors(said: _Said) -> Packing:
    form = said.one_of("format", tuple(_COMPRESSED_ROWS), None)
    said.one_of("quantization_status", ("compressed", None), None)
    groups = said.fields.get("config_groups") or {}
    for group in groups.values() if isinstance(groups, dict) else ():
        own = group.get("format") if isinstance(group, dict) else None
        if own not in (None, form):
            raise said.refuse(f"some of them are stored as {own}, others as {form}")
    sparse = said.fields.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        raise said.refuse(f"they are sparse too ({sparse['format']})")
    if said.fields.get("transform_config"):
        raise said.refuse("they were rotated by a transform_config")
    words = _compressed_words(form, groups if isinstance(groups, dict) else {})
    return Packing(f"compressed-tensors {form}", _COMPRESSED, "scale", _COMPRESSED_ROWS[form], words=words)


def _compressed_words(form: str, groups: Mapping[str, Any]) -> Words | None:
    """How the integers of this format can be kept; None for floating point, and where matrices differ in their bits."""
    name = f"compressed-tensors {form}"
    if form == "int-quantized":
        return Words(name, 8, rows_first(1), lambda pieces: scaled_rows(pieces, "int8"))
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    stated = [own.get("num_bits") for own in weights if isinstance(own, dict)]
    bits = next((bits for bits in (4, 8) if stated and all(each == bits for each in stated)), None)
    if form != "pack-quantized" or bits is None:
        return None
    return Words(name, bits, rows_first(WORD_BITS // bits), packed_rows)


_METHODS: Mapping[str, Callable[[_Said], Packing]] = {
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fp8,
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}
