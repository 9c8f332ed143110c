"""Runs several LoRA adapters over one span's frozen blocks; each session uses one of them or none.

Each adapted linear layer carries a forward hook, which adds to each row of a batch what its session's adapter gives.
A block with a deep prompt carries one that does so to the first positions of rows, before the block sees them.
No module is replaced, so a layer may be packed, quantized or plain, and a span without adapters has no hooks. Which
rows use which adapter is computed once for each batch. Nothing of one adapter may reach another's rows: if many
adapters share a small batch on a GPU, their matrices are joined into one product, and what does not belong to a row
is set to exact zeros before the second product, NaN and infinity included.

Everything belongs to the device thread except `names`, which is replaced as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peerd.compute.adapters.lora import (
    PROMPT,
    BlockModule,
    DeepPrompt,
    Lora,
    LoraPair,
    bytes_of,
    check_fits,
    lora_delta,
    within,
)
from peerd.compute.adapters.prefixes import prefix_of
from peerd.compute.attention.prefix import BatchPrefix, widths_of_cache
from peerd.compute.errors import AdapterError, UnknownAdapterError
from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.steps import Segment

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from peerd.compute.adapters.file import AdapterFile
    from peerd.compute.model.span_model import SpanModel

# An adapter takes five operations; all adapters joined take eight, of which each row uses only its own part. A GPU
# waits for launches, so a few rows under many adapters are joined. A CPU waits for arithmetic: one product over eight
# adapters of rank 16 took 0.8 to 4 times as long as eight small ones (576 to 2048 wide, 1 and 32 rows each).
_MANY = 3
_FEW_ROWS = 128
# The positions of the forward that finds the layers that see every position once.
_PROBE_POSITIONS = 3


class SpanAdapters:
    """The adapters of one span, by name. Loading or unloading one changes nothing for sessions under others."""

    def __init__(self, model: SpanModel) -> None:
        #: The names of the loaded adapters.
        self.names: frozenset[str] = frozenset()
        self._model = model
        self._loaded: dict[str, Lora] = {}
        self._hooks: dict[BlockModule, RemovableHandle] = {}
        self._modules: Mapping[BlockModule, nn.Module] | None = None
        self._routing: _Routing | _Everything | None = None

    def __repr__(self) -> str:
        return f"<SpanAdapters {self._model.span} {' '.join(sorted(self.names))}>"

    @property
    def n_bytes(self) -> int:
        """The memory that the adapters take on the device, in bytes."""
        return sum(bytes_of(lora) for lora in self._loaded.values())

    def load(self, name: str, lora: Lora) -> None:
        """Load the weights of this span's blocks; those of other blocks are left out. Raises AdapterError.

        Refused are: a layer that the span lacks or that does not see the positions one by one, shapes that do not
        fit, values that the span's dtype cannot hold, and a name that is taken.
        """
        if name in self._loaded:
            raise AdapterError(f"there is an adapter {name!r} already")
        own = within(lora, self._model.span)
        self.check(own)
        device, dtype = self._model.device, self._model.dtype
        rounded = {key: value.to(device, dtype) for key, value in own.items()}
        for (block, module), value in rounded.items():
            # One infinite value in a joint product would reach all rows.
            if not value.is_finite:
                raise AdapterError(f"block {block}: {module} has a value that is not finite in {dtype}")
        self._loaded[name] = rounded
        self.names = frozenset(self._loaded)
        self._hook(own)

    def unload(self, name: str) -> None:
        """Forget an adapter that no session uses. Raises KeyError if there is none of that name."""
        del self._loaded[name]
        self.names = frozenset(self._loaded)
        used = set(chain.from_iterable(self._loaded.values()))
        for key in set(self._hooks) - used:
            self._hooks.pop(key).remove()

    def check(self, lora: Lora) -> None:
        """Raise AdapterError unless every layer is one of this span that can be adapted, and has fitting shapes."""
        layers = {key: _features(module) for key, module in self._adaptable().items()}
        interface = self._model.family.attention_interface
        caches = {
            block: widths_of_cache(kind, attention_interface=interface)
            for block, kind in enumerate(self._model.kinds, self._model.span.start)
        }
        check_fits(lora, layers, self._model.hidden_size, caches)

    def check_complete(self, file: AdapterFile) -> None:
        """Raise AdapterError if the file's list of targets names a layer of this span that it has no weights for."""
        file.check_complete(self._adaptable())

    @contextmanager
    def applied(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Inside this context, the model's next positions are those of `segments`, each under its own adapter."""
        names = {segment.adapter for segment in segments} - {""}
        loaded = {name: self._loaded[name] for name in sorted(names)}
        with self._routed(_Routing(segments, loaded, self._model.device) if names else None):
            yield

    def prefix_of(self, segments: Sequence[Segment]) -> BatchPrefix | None:
        """What these segments' adapters put in the place of keys and values; None if that is nothing."""
        return prefix_of(segments, self._loaded, self._model.span.start)

    @contextmanager
    def under(self, name: str) -> Iterator[None]:
        """Inside this context, all positions are under one loaded adapter, or none if `name` is ""; gradients flow.

        Raises UnknownAdapterError: the adapter may have been unloaded between a forward and its backward.
        """
        if name and name not in self._loaded:
            raise UnknownAdapterError(f"the adapter {name!r} is no longer here")
        with self._routed(_Everything(self._loaded[name]) if name else None):
            yield

    @contextmanager
    def _routed(self, routing: _Routing | _Everything | None) -> Iterator[None]:
        self._routing, before = routing, self._routing
        try:
            yield
        finally:
            self._routing = before

    def _hook(self, lora: Lora) -> None:
        """Add hooks to these layers, and to the blocks that have deep prompts."""
        for key, value in lora.items():
            if key in self._hooks or (isinstance(value, DeepPrompt) and key[1] != PROMPT):
                # A prefix acts where keys and values are cached, without a hook.
                continue
            if isinstance(value, DeepPrompt):
                block = self._model.layers[key[0] - self._model.span.start]
                self._hooks[key] = block.register_forward_pre_hook(self._prompter(key), with_kwargs=True)
            else:
                self._hooks[key] = self._adaptable()[key].register_forward_hook(self._adder(key))

    def _adder(self, key: BlockModule) -> Any:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            return self._routing.add(key, inputs[0], output) if self._routing is not None else None

        return add

    def _prompter(self, key: BlockModule) -> Any:
        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            if not isinstance(self._routing, _Routing):
                # Only sessions use adapters with deep prompts. Passes get theirs in another way.
                return None
            if args:
                return (self._routing.prompted(key, args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": self._routing.prompted(key, kwargs["hidden_states"])}

        return add

    def _adaptable(self) -> Mapping[BlockModule, nn.Module]:
        if self._modules is None:
            self._modules = _position_wise(self._model)
        return self._modules


class _Everything:
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


class _Routing:
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


def _features(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of any linear module: Linear, its packed and quantized forms, and GPT-2's Conv1D."""
    if hasattr(module, "nf"):
        weight: Any = module.weight
        return int(weight.shape[1]), int(weight.shape[0])
    sizes: Any = module
    return int(sizes.out_features), int(sizes.in_features)


def _is_linear(module: nn.Module) -> bool:
    if type(module).__name__ == "Conv1D":
        return hasattr(module, "nf")
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def linear_layers(
    layers: Iterable[nn.Module], kinds: Iterable[LayerKind], first_block: int = 0
) -> dict[BlockModule, nn.Module]:
    """The linear layers beside which an adapter can stand, whatever device they are on, by block and name."""
    found: dict[BlockModule, nn.Module] = {}
    for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True), first_block):
        for name, module in layer.named_modules():
            parts = name.split(".")
            # Experts see only the positions routed to them. Cached latents are expanded for one whole row at a time, or
            # not at all (`attention.latent`).
            beside_batch = "experts" in parts or (kind.latent and parts[-1] == "kv_b_proj")
            if name and _is_linear(module) and not beside_batch:
                found[number, name] = module
    return found


def _position_wise(model: SpanModel) -> dict[BlockModule, nn.Module]:
    """The linear layers that see each position exactly once, in order: found out by running some."""
    seen: dict[BlockModule, list[tuple[int, int]]] = {}
    found = linear_layers(model.layers, model.kinds, model.span.start)
    handles = [module.register_forward_hook(_watcher(seen.setdefault(key, []))) for key, module in found.items()]
    try:
        with torch.inference_mode():
            model.forward_no_cache(
                torch.zeros(1, _PROBE_POSITIONS, model.hidden_size, device=model.device, dtype=model.dtype)
            )
    finally:
        for handle in handles:
            handle.remove()
    return {
        key: module
        for key, module in found.items()
        if seen[key] == [(_PROBE_POSITIONS * features, _PROBE_POSITIONS * out) for out, features in [_features(module)]]
    }


def _watcher(seen: list[tuple[int, int]]) -> Any:
    def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.append((inputs[0].numel(), output.numel()))

    return watch
