"""What the adapters add to a linear layer's output, row by row.

Nothing of one adapter may reach another's rows: if many adapters share a small batch on a GPU, their matrices are
joined into one product, and what does not belong to a row is set to exact zeros before the second product, NaN and
infinity included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch

from peerd.compute.adapters.lora import BlockModule, DeepPrompt, Lora, LoraPair, lora_delta
from peerd.compute.steps import Segment

# An adapter takes five operations; all adapters joined take eight, of which each row uses only its own part. A GPU
# waits for launches, so a few rows under many adapters are joined. A CPU waits for arithmetic: one product over eight
# adapters of rank 16 took 0.8 to 4 times as long as eight small ones (576 to 2048 wide, 1 and 32 rows each).
_MANY = 3
_FEW_ROWS = 128


class Everything:
    """Puts all positions under one adapter."""

    def __init__(self, lora: Lora) -> None:
        self._lora = lora

    def add(self, key: BlockModule, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        pair = self._lora.get(key)
        if not isinstance(pair, LoraPair):
            return output
        return output + lora_delta(inputs, pair.a, pair.b, pair.scale)


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """The rows of a batch that are under one adapter: a slice if they lie side by side, else their numbers."""

    lora: Lora
    rows: slice | torch.Tensor


class Routing:
    """Which rows of a batch are under which adapter. For inference only, since it adds in place."""

    def __init__(self, segments: Sequence[Segment], loaded: Mapping[str, Lora], device: torch.device) -> None:
        runs: dict[str, list[tuple[int, int]]] = {name: [] for name in loaded}
        count = 0
        for segment in segments:
            if segment.adapter:
                runs[segment.adapter].append((count, count + segment.count))
            count += segment.count
        self._groups = [_Group(lora, _rows(runs[name], device)) for name, lora in loaded.items()]
        self._segments = segments
        self._loaded = loaded
        self._count = count
        self._at_once = _pays_at_once(len(self._groups), count, device)
        self._masks: dict[tuple[int, ...], torch.Tensor] = {}

    def add(self, key: BlockModule, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        x, y = inputs.reshape(self._count, -1), output.reshape(self._count, -1)
        present = [(group, pair) for group in self._groups if isinstance(pair := group.lora.get(key), LoraPair)]
        if len(present) > 1 and self._at_once:
            y += self._joint(x, present)
        else:
            for group, pair in present:
                delta = lora_delta(x[group.rows], pair.a, pair.b, pair.scale)
                if isinstance(group.rows, slice):
                    y[group.rows] += delta
                else:
                    y.index_add_(0, group.rows, delta)
        return y.view(output.shape)

    def prompted(self, key: BlockModule, hidden: torch.Tensor) -> torch.Tensor:
        """The input of a block, with deep prompts added to the first positions of the rows that have some."""
        flat, first = hidden.reshape(self._count, -1), 0
        for segment in self._segments:
            prompt = self._loaded[segment.adapter].get(key) if segment.adapter else None
            if isinstance(prompt, DeepPrompt) and segment.start < len(prompt.values):
                added = prompt.values[segment.start : segment.end]
                if flat.data_ptr() == hidden.data_ptr():
                    # A copy, because the caller may go on using its own tensor.
                    flat = flat.clone()
                flat[first : first + len(added)] += added
            first += segment.count
        return flat.view(hidden.shape)

    def _joint(self, x: torch.Tensor, present: Sequence[tuple[_Group, LoraPair]]) -> torch.Tensor:
        """The sum of all adapters as one product: each row's part of the joint rank that is not its own becomes
        zero.
        """
        a = torch.cat([pair.a for _, pair in present])
        b = torch.cat([pair.b for _, pair in present], dim=1)
        scales = self._mask(x, present)
        # Not multiplied by zero: an overflow under another adapter's matrix would become NaN.
        inner = torch.where(scales != 0, (x @ a.T) * scales, 0)
        return inner @ b.T

    def _mask(self, x: torch.Tensor, present: Sequence[tuple[_Group, LoraPair]]) -> torch.Tensor:
        """`[rows, joint rank]`: the scale if the row is under that adapter, else zero. Most layers share one mask."""
        key = tuple(chain.from_iterable((id(group), pair.rank, hash(pair.scale)) for group, pair in present))
        mask = self._masks.get(key)
        if mask is None:
            mask = x.new_zeros(self._count, sum(pair.rank for _, pair in present))
            first = 0
            for group, pair in present:
                mask[group.rows, first : first + pair.rank] = pair.scale
                first += pair.rank
            self._masks[key] = mask
        return mask


def _pays_at_once(adapters: int, rows: int, device: torch.device) -> bool:
    return device.type != "cpu" and adapters >= _MANY and rows <= _FEW_ROWS


def _rows(runs: Sequence[tuple[int, int]], device: torch.device) -> slice | torch.Tensor:
    if all(end == start for (_, end), (start, _) in pairwise(runs)):
        return slice(runs[0][0], runs[-1][1])
    return torch.tensor([row for start, end in runs for row in range(start, end)], device=device)
