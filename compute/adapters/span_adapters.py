"""Runs several LoRA adapters over one span's frozen blocks; each session uses one of them or none.

Each adapted linear layer carries a forward hook, which adds to each row of a batch what its session's adapter gives.
A block with a deep prompt carries one that does so to the first positions of rows, before the block sees them.
No module is replaced, so a layer may be packed, quantized or plain, and a span without adapters has no hooks. Which
rows use which adapter is computed once for each batch (`routing.py`).

Everything belongs to the device thread except `names`, which is replaced as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peerd.compute.adapters.linear_layers import features, position_wise
from peerd.compute.adapters.lora import (
    PROMPT,
    BlockModule,
    DeepPrompt,
    Lora,
    bytes_of,
    check_fits,
    within,
)
from peerd.compute.adapters.prefixes import prefix_of
from peerd.compute.adapters.routing import Everything, Routing
from peerd.compute.attention.prefix import BatchPrefix, widths_of_cache
from peerd.compute.errors import AdapterError, UnknownAdapterError
from peerd.compute.steps import Segment

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from peerd.compute.adapters.file import AdapterFile
    from peerd.compute.model.span_model import SpanModel


class SpanAdapters:
    """The adapters of one span, by name. Loading or unloading one changes nothing for sessions under others."""

    def __init__(self, model: SpanModel) -> None:
        #: The names of the loaded adapters.
        self.names: frozenset[str] = frozenset()
        self._model = model
        self._loaded: dict[str, Lora] = {}
        self._hooks: dict[BlockModule, RemovableHandle] = {}
        self._modules: Mapping[BlockModule, nn.Module] | None = None
        self._routing: Routing | Everything | None = None

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
        layers = {key: features(module) for key, module in self._adaptable().items()}
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
        with self._routed(Routing(segments, loaded, self._model.device) if names else None):
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
        with self._routed(Everything(self._loaded[name]) if name else None):
            yield

    @contextmanager
    def _routed(self, routing: Routing | Everything | None) -> Iterator[None]:
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
            if not isinstance(self._routing, Routing):
                # Only sessions use adapters with deep prompts. Passes get theirs in another way.
                return None
            if args:
                return (self._routing.prompted(key, args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": self._routing.prompted(key, kwargs["hidden_states"])}

        return add

    def _adaptable(self) -> Mapping[BlockModule, nn.Module]:
        if self._modules is None:
            self._modules = position_wise(self._model)
        return self._modules
