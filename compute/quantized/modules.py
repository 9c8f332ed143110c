"""Chooses the parameters of a block that are quantized, and has the modules that replace them.

Linear layers are replaced, and GPT-2's `Conv1D`, which is a transposed one. Some experts are one parameter of three
dimensions in Transformers, 97 % of a Mixtral block; these become a stack of matrices. The family's own forward indexes
the stack by expert, and so reads only the experts to which tokens were routed. Norms, biases, routers and gates are not
quantized: they are small, and their decisions must not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peerd.compute.errors import UnsupportedModelError
from peerd.compute.quantized.formats import Format
from peerd.compute.quantized.group_matrix import GroupMatrix
from peerd.compute.quantized.groups import GroupForm
from peerd.compute.quantized.matrix import QuantizedMatrix, StoredMatrix

# Modules that decide to which experts tokens go, or with what weight.
_ROUTERS = ("gate", "router", "shared_expert_gate")
# `nn.Linear` and its equals; other subclasses compute something else than a linear layer.
_LINEAR_TYPES = ("Linear", "FalconLinear")
# Experts that compute `x @ weight` although they have no `is_transposed`.
_TRANSPOSED_TYPES = ("Llama4TextExperts",)
# Narrower matrices are gates with another name.
_SMALLEST_SIDE = 8
# If less than this share of a block can be quantized, we do not know its layout.
_LEAST_SHARE = 0.9

AnyForm = Format | GroupForm


@dataclass(frozen=True, slots=True)
class Quantizable:
    """A parameter that can be quantized: `count` matrices, each `[rows, columns]` of a linear layer.

    A `stacked` parameter has three dimensions; a `transposed` one is stored `[columns, rows]`.
    """

    name: str
    count: int
    rows: int
    columns: int
    stacked: bool
    transposed: bool

    def n_bytes(self, form: AnyForm) -> int:
        """How many bytes it takes when quantized."""
        return self.count * form.n_bytes(self.rows, self.columns)


class QuantizedLinear(nn.Module):
    """Replaces an `nn.Linear`. `weight` dequantizes the whole weight at each use."""

    def __init__(
        self,
        form: AnyForm,
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
        self.values: torch.Tensor = nn.Buffer(values)
        self.scales: torch.Tensor = nn.Buffer(scales)
        self.bias = bias
        #: The matrix whose memory `values` and `scales` are.
        self.matrix = matrix_of(form, self.values, self.scales, (out_features, in_features), dtype)

    def extra_repr(self) -> str:
        return f"{self.form.name}, in_features={self.in_features}, out_features={self.out_features}"

    @property
    def weight(self) -> torch.Tensor:
        """The weight as the product sees it, `[out_features, in_features]`, dequantized at this moment."""
        return self.matrix.dequantize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.matrix.product(x)
        return result if self.bias is None else result + self.bias


class QuantizedStack(nn.Module):
    """Replaces a parameter of three dimensions, one matrix for each expert: `stack[expert]` can be used in products."""

    def __init__(
        self, form: AnyForm, values: torch.Tensor, scales: torch.Tensor, target: Quantizable, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.form = form
        self.target = target
        self.values: torch.Tensor = nn.Buffer(values)
        self.scales: torch.Tensor = nn.Buffer(scales)
        #: Each expert's matrix.
        self.matrices = tuple(
            matrix_of(form, *own, (target.rows, target.columns), dtype, transposed=target.transposed)
            for own in zip(self.values, self.scales, strict=True)
        )

    def extra_repr(self) -> str:
        return f"{self.form.name}, {self.target.count} of [{self.target.rows}, {self.target.columns}]"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in (torch.bmm, torch.Tensor.bmm) and isinstance(args[1], cls):
            return args[1].bmm_from_left(args[0])
        return NotImplemented

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter that this replaces."""
        target = self.target
        sides = (target.columns, target.rows) if target.transposed else (target.rows, target.columns)
        return torch.Size((target.count, *sides))

    def __len__(self) -> int:
        return self.target.count

    def __iter__(self) -> Iterator[StoredMatrix]:
        return iter(self.matrices)

    def __getitem__(self, expert: int | torch.Tensor) -> StoredMatrix:
        return self.matrices[int(expert)]

    def bmm_from_left(self, x: torch.Tensor) -> torch.Tensor:
        """`torch.bmm(x, stack)`: `[experts, n, in]` to `[experts, n, out]`.

        Llama 4 gives every token to every expert, as zeros where the token is not routed. Rows of zeros are skipped
        here.
        """
        results = []
        for rows, matrix in zip(x, self, strict=True):
            routed = rows.detach().any(-1).nonzero().squeeze(-1)
            result = rows.new_zeros(len(rows), self.target.rows)
            if len(routed):
                result = result.index_copy(0, routed, matrix.matmul_from_left(rows[routed]))
            results.append(result)
        return torch.stack(results)


def matrix_of(
    form: AnyForm,
    values: torch.Tensor,
    scales: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    transposed: bool = False,
) -> StoredMatrix:
    """The matrix whose values and scales lie here."""
    if isinstance(form, GroupForm):
        return GroupMatrix(form, values, scales, shape, dtype, transposed=transposed)
    return QuantizedMatrix(form, values, scales, shape, dtype, transposed=transposed)


def matrices_in(module: nn.Module) -> Iterator[StoredMatrix]:
    """The matrices of all quantized parts of a module."""
    for part in module.modules():
        if isinstance(part, QuantizedLinear):
            yield part.matrix
        elif isinstance(part, QuantizedStack):
            yield from part.matrices


def quantizables(block: nn.Module) -> dict[str, Quantizable]:
    """The block's parameters that can be quantized, by name; the block may be on any device, also meta.

    Raises UnsupportedModelError if most of the block could not be quantized.
    """
    found = matrices_of(block)
    total = sum(parameter.numel() for parameter in block.parameters())
    share = sum(target.count * target.rows * target.columns for target in found.values()) / total
    if share < _LEAST_SHARE:
        raise UnsupportedModelError(
            f"{type(block).__name__}: only {share:.0%} of a block can be quantized, for its layout is not known;"
            " serve it without --quantize"
        )
    return found


def matrices_of(block: nn.Module) -> dict[str, Quantizable]:
    """The block's parameters that we know how to replace, by name, however little of the block they are."""
    all_targets = (target for prefix, module in block.named_modules() for target in _of_module(prefix, module))
    return {target.name: target for target in all_targets if min(target.rows, target.columns) >= _SMALLEST_SIDE}


def put_quantized(block: nn.Module, target: Quantizable, form: AnyForm, device: torch.device) -> list[StoredMatrix]:
    """Replace the parameter at `target` by memory for its quantized form. Returns the matrices, which the caller must
    store.
    """
    owner_name, _, leaf = target.name.rpartition(".")
    owner: Any = block.get_submodule(owner_name)
    dtype = getattr(owner, leaf).dtype
    shape = (target.rows, target.columns)
    values, scales = form.empty(shape, device, count=target.count)
    if target.stacked:
        stack = QuantizedStack(form, values, scales, target, dtype)
        delattr(owner, leaf)
        setattr(owner, leaf, stack)
        return list(stack)
    linear = QuantizedLinear(
        form, values[0], scales[0], owner.bias, in_features=target.columns, out_features=target.rows, dtype=dtype
    )
    block.set_submodule(owner_name, linear)
    return [matrix_of(form, linear.values, linear.scales, shape, dtype, transposed=target.transposed)]


def _of_module(prefix: str, module: nn.Module) -> list[Quantizable]:
    kind = type(module).__name__
    if prefix.rpartition(".")[2] in _ROUTERS:
        return []
    if isinstance(module, nn.Linear) and kind in _LINEAR_TYPES:
        return [Quantizable(f"{prefix}.weight", 1, module.out_features, module.in_features, False, False)]
    if kind == "Conv1D":
        columns, rows = module.get_parameter("weight").shape
        return [Quantizable(f"{prefix}.weight", 1, rows, columns, False, True)]
    if not kind.endswith("Experts"):
        return []
    transposed = bool(getattr(module, "is_transposed", kind in _TRANSPOSED_TYPES))
    return [
        _stack(f"{prefix}.{name}", parameter, transposed)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def _stack(name: str, parameter: torch.Tensor, transposed: bool) -> Quantizable:
    count, first, second = parameter.shape
    rows, columns = (second, first) if transposed else (first, second)
    return Quantizable(name, count, rows, columns, True, transposed)
