"""Which parameters of a block are quantized, and the modules that take their places.

Linear layers (and GPT-2's `Conv1D`, which is one turned round) are replaced. Experts that Transformers keeps as one
parameter of three dimensions, 97 % of a Mixtral block, become a stack of matrices: the family's own forward indexes it
by expert and so touches only those that tokens were routed to. Norms, biases, routers and gates stay as they are: they
are small, and what they decide must not change. Knows no checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peerd.compute.errors import UnsupportedModel
from peerd.compute.quantized.formats import Format
from peerd.compute.quantized.matrix import QuantizedMatrix, empty_storage

# What decides where tokens go, or how much of an expert they take.
_ROUTERS = ("gate", "router", "shared_expert_gate")
# `nn.Linear` under another name; other subclasses do something else than a linear layer.
_LINEAR_TYPES = ("Linear", "FalconLinear")
# Experts that write `x @ weight` without saying so in `is_transposed`.
_TRANSPOSED_TYPES = ("Llama4TextExperts",)
# Narrower matrices are gates by another name.
_SMALLEST_SIDE = 8
# A block of which less becomes small is one whose layout is not known here.
_LEAST_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter that can be quantized: `count` matrices, each `[rows, columns]` of a linear layer.

    `stacked` parameters have three dimensions; `transposed` ones are stored `[columns, rows]`.
    """

    name: str
    count: int
    rows: int
    columns: int
    stacked: bool
    transposed: bool

    def n_bytes(self, form: Format) -> int:
        """How many bytes it takes once it is quantized."""
        return self.count * form.n_bytes(self.rows, self.columns)


class QuantizedLinear(nn.Module):
    """Stands in for an `nn.Linear`. `weight` makes the plain weight anew each time."""

    def __init__(
        self,
        form: Format,
        values: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.form = form
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.values: torch.Tensor = nn.Buffer(values)
        self.scales: torch.Tensor = nn.Buffer(scales)
        self.bias = bias

    def extra_repr(self) -> str:
        return f"{self.form.name}, in_features={self.in_features}, out_features={self.out_features}"

    @property
    def weight(self) -> torch.Tensor:
        """The weight as the product sees it: `[out_features, in_features]`, dequantized now."""
        return self.matrix.dequantize()

    @property
    def matrix(self) -> QuantizedMatrix:
        return QuantizedMatrix(self.form, self.values, self.scales, (self.out_features, self.in_features), self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.matrix.product(x)
        return result if self.bias is None else result + self.bias


class QuantizedStack(nn.Module):
    """Stands in for a parameter of three dimensions, one matrix an expert: `stack[expert]` takes part in products."""

    def __init__(
        self, form: Format, values: torch.Tensor, scales: torch.Tensor, place: Place, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.form = form
        self.place = place
        self.dtype = dtype
        self.values: torch.Tensor = nn.Buffer(values)
        self.scales: torch.Tensor = nn.Buffer(scales)

    def extra_repr(self) -> str:
        return f"{self.form.name}, {self.place.count} of [{self.place.rows}, {self.place.columns}]"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in (torch.bmm, torch.Tensor.bmm) and isinstance(args[1], cls):
            return args[1].bmm_from_left(args[0])
        return NotImplemented

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter whose place this takes."""
        place = self.place
        sides = (place.columns, place.rows) if place.transposed else (place.rows, place.columns)
        return torch.Size((place.count, *sides))

    def __len__(self) -> int:
        return self.place.count

    def __iter__(self) -> Iterator[QuantizedMatrix]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, expert: int | torch.Tensor) -> QuantizedMatrix:
        index = int(expert)
        shape = (self.place.rows, self.place.columns)
        transposed = self.place.transposed
        return QuantizedMatrix(
            self.form, self.values[index], self.scales[index], shape, self.dtype, transposed=transposed
        )

    def bmm_from_left(self, x: torch.Tensor) -> torch.Tensor:
        """`torch.bmm(x, stack)`: `[experts, n, in]` to `[experts, n, out]`.

        Llama 4 gives every token to every expert, as zeros where it is not routed; those are left out here.
        """
        results = []
        for rows, matrix in zip(x, self, strict=True):
            routed = rows.detach().any(-1).nonzero().squeeze(-1)
            result = rows.new_zeros(len(rows), self.place.rows)
            if len(routed):
                result = result.index_copy(0, routed, matrix.matmul_from_left(rows[routed]))
            results.append(result)
        return torch.stack(results)


def places(block: nn.Module) -> dict[str, Place]:
    """The block's parameters that can be quantized, by name; on any device, so meta too.

    Raises UnsupportedModel where that would leave most of the block as it is.
    """
    all_places = (place for prefix, module in block.named_modules() for place in _of_module(prefix, module))
    found = [place for place in all_places if min(place.rows, place.columns) >= _SMALLEST_SIDE]
    total = sum(parameter.numel() for parameter in block.parameters())
    share = sum(place.count * place.rows * place.columns for place in found) / total
    if share < _LEAST_SHARE:
        raise UnsupportedModel(
            f"{type(block).__name__}: only {share:.0%} of a block can be quantized, for its layout is not known;"
            " serve it without --quantize"
        )
    return {place.name: place for place in found}


def put_quantized(block: nn.Module, place: Place, form: Format, device: torch.device) -> list[QuantizedMatrix]:
    """Replace what is at `place` by room for its quantized form. Returns the matrices, which are to be stored."""
    owner_name, _, leaf = place.name.rpartition(".")
    owner: Any = block.get_submodule(owner_name)
    dtype = getattr(owner, leaf).dtype
    shape = (place.rows, place.columns)
    values, scales = empty_storage(form, shape, device, count=place.count)
    if place.stacked:
        stack = QuantizedStack(form, values, scales, place, dtype)
        delattr(owner, leaf)
        setattr(owner, leaf, stack)
        return [stack[index] for index in range(place.count)]
    linear = QuantizedLinear(
        form, values[0], scales[0], owner.bias, in_features=place.columns, out_features=place.rows, dtype=dtype
    )
    block.set_submodule(owner_name, linear)
    return [QuantizedMatrix(form, linear.values, linear.scales, shape, dtype, transposed=place.transposed)]


def _of_module(prefix: str, module: nn.Module) -> list[Place]:
    kind = type(module).__name__
    if prefix.rpartition(".")[2] in _ROUTERS:
        return []
    if isinstance(module, nn.Linear) and kind in _LINEAR_TYPES:
        return [Place(f"{prefix}.weight", 1, module.out_features, module.in_features, False, False)]
    if kind == "Conv1D":
        columns, rows = module.get_parameter("weight").shape
        return [Place(f"{prefix}.weight", 1, rows, columns, False, True)]
    if not kind.endswith("Experts"):
        return []
    transposed = bool(getattr(module, "is_transposed", kind in _TRANSPOSED_TYPES))
    return [
        _stack(f"{prefix}.{name}", parameter, transposed)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def _stack(name: str, parameter: torch.Tensor, transposed: bool) -> Place:
    count, first, second = parameter.shape
    rows, columns = (second, first) if transposed else (first, second)
    return Place(name, count, rows, columns, True, transposed)
