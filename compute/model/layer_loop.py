"""Calls a decoder's layers one after the other, without the overhead of the decoder's own forward.

A Transformers decoder spends a tenth of a millisecond or two in each call on decorators, masks and defaults, which
is much for one token. For a span the rest is a loop: each layer gets the hidden states of the layer before, and the
same few other arguments. `LayerLoop` learns these by watching the decoder, once over one position and once over
several. It takes over only if both runs agree and every argument is understood: position ids, the cache, a constant,
or what another part of the decoder (rotary embeddings) made of those. Otherwise the decoder runs as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_HIDDEN, _POSITIONS, _CACHE = "hidden", "positions", "cache"
_CONSTANTS = (bool, int, float, str, type(None))

# The origin of an argument: one of the names above, ("constant", value) or ("made", number of the call).
_Source = str | tuple[str, Any]


class _NotUnderstood(Exception):
    """The decoder does something that this loop cannot repeat."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A module and the origins of its arguments."""

    module: nn.Module
    args: tuple[_Source, ...]
    kwargs: tuple[tuple[str, _Source], ...]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """The calls that the decoder makes: other parts first, then its layers."""

    made: tuple[_Call, ...]
    layers: tuple[_Call, ...]


@dataclass(slots=True)
class _Watch:
    """The observations of one forward."""

    known: dict[int, _Source]
    hidden: torch.Tensor
    made: list[_Call] = field(default_factory=list)
    layers: list[_Call] = field(default_factory=list)
    # Objects whose ids are in `known` must not be freed meanwhile.
    kept: list[Any] = field(default_factory=list)
    understood: bool = True

    def source(self, value: Any) -> _Source:
        if id(value) in self.known:
            return self.known[id(value)]
        if isinstance(value, _CONSTANTS):
            return ("constant", value)
        raise _NotUnderstood

    def call(self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> _Call:
        return _Call(
            module, tuple(map(self.source, args)), tuple((name, self.source(value)) for name, value in kwargs.items())
        )


class LayerLoop:
    """The loop over one decoder's `layers`. `run` calls the decoder's forward until the loop is learned."""

    def __init__(self, decoder: nn.Module, layers: nn.ModuleList) -> None:
        self._decoder = decoder
        self._layers = layers
        # The recipe seen, by whether there were several positions.
        self._seen: dict[bool, _Recipe | None] = {}
        self._recipe: _Recipe | None = None

    @property
    def learned(self) -> bool:
        """Whether the decoder is understood, so that its forward is no longer needed."""
        return self._recipe is not None

    def run(
        self, forward: Callable[[], torch.Tensor], hidden: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Run `hidden` [B, T, hidden_size] through the layers. `forward` runs the decoder on the same input."""
        if self._recipe is not None:
            return self._run(self._recipe, hidden, positions, cache)
        several = hidden.shape[1] > 1
        if several in self._seen:
            return forward()
        output, self._seen[several] = self._watched(forward, hidden, positions, cache)
        if self._seen.get(False) == self._seen.get(True):
            self._recipe = self._seen[several]
        return output

    def _run(self, recipe: _Recipe, hidden: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        values = {_HIDDEN: hidden, _POSITIONS: positions, _CACHE: cache}
        made: list[Any] = []

        def value(source: _Source) -> Any:
            if isinstance(source, str):
                return values[source]
            return made[source[1]] if source[0] == "made" else source[1]

        for call in recipe.made:
            made.append(call.module(*map(value, call.args), **{name: value(source) for name, source in call.kwargs}))
        # Most layers get the same: worked out once.
        shared: dict[tuple[tuple[str, _Source], ...], dict[str, Any]] = {}
        for call in recipe.layers:
            kwargs = shared.get(call.kwargs)
            if kwargs is None:
                kwargs = shared[call.kwargs] = {name: value(source) for name, source in call.kwargs}
            output = call.module(hidden, *map(value, call.args[1:]), **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def _watched(
        self, forward: Callable[[], torch.Tensor], hidden: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, _Recipe | None]:
        """The decoder's own output, and the recipe for it; None if it is not understood."""
        watch = _Watch({id(hidden): _HIDDEN, id(positions): _POSITIONS, id(cache): _CACHE}, hidden)
        others = [child for child in self._decoder.children() if child is not self._layers]
        with ExitStack() as hooks:
            for layer in self._layers:
                hook = layer.register_forward_hook(_layer_hook(watch), with_kwargs=True)
                hooks.callback(hook.remove)
            for child in others:
                hook = child.register_forward_hook(_other_hook(watch), with_kwargs=True)
                hooks.callback(hook.remove)
            output = forward()
        in_order = [call.module for call in watch.layers] == list(self._layers)
        if not (watch.understood and in_order and output is watch.hidden):
            return output, None
        return output, _Recipe(tuple(watch.made), tuple(watch.layers))


def _layer_hook(watch: _Watch) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            if not args or args[0] is not watch.hidden:
                raise _NotUnderstood
            watch.layers.append(watch.call(module, (None, *args[1:]), kwargs))
        except _NotUnderstood:
            watch.understood = False
        watch.hidden = output[0] if isinstance(output, tuple) else output

    return hook


def _other_hook(watch: _Watch) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if any(output is arg for arg in args):
            # Identities, and dropouts that are off.
            return
        try:
            call = watch.call(module, args, kwargs)
        except _NotUnderstood:
            # This matters only if a layer gets the output.
            return
        watch.known[id(output)] = ("made", len(watch.made))
        watch.made.append(call)
        watch.kept.append(output)

    return hook
