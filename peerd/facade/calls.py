"""Hooks on a causal model and its decoder, which read the arguments of a forward before the decoder's own code runs.

The signatures of the model's methods are not changed, because `generate`, `Trainer` and peft inspect them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import output_capturing

from peerd.compute.transformers_compat import CACHE_NAMES, cache_argument
from peerd.facade.blocks import Call, RemoteBlock, is_watched_after, plan_runs, pop, push
from peerd.facade.cache import RemoteCache
from peerd.facade.inputs import check_inputs, check_prefix_mask
from peerd.facade.prefix import length_of
from peerd.facade.steps import ROLLBACK

_hints = threading.local()
_SELECTS = hasattr(output_capturing, "selected_hidden_states")


def watch_calls(causal: Any, decoder: Any, *, layers: str, embeddings: str) -> None:
    """Install the hooks. `layers`, `embeddings`: the names of the decoder's list of layers, and of its embeddings."""
    name = cache_argument(type(causal).forward)
    causal.register_forward_pre_hook(_BeforeCausal(name), with_kwargs=True)
    causal.register_forward_hook(_after_causal, always_call=True)
    decoder.register_forward_pre_hook(_BeforeDecoder(decoder, layers, embeddings), with_kwargs=True)
    decoder.register_forward_hook(_after_decoder, with_kwargs=True, always_call=True)


def _rename_cache(arguments: dict[str, Any], name: str) -> None:
    """Rename the cache argument, whatever its name, to the one that the forward accepts."""
    for other in CACHE_NAMES:
        if other != name and other in arguments and arguments.get(name) is None:
            arguments[name] = arguments.pop(other)


class _BeforeCausal:
    """Notes whether only the last position's logits are needed, and renames the cache."""

    def __init__(self, cache_name: str) -> None:
        self._cache_name = cache_name

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if any(kwargs.get(name) is not None for name in CACHE_NAMES):
            _rename_cache(kwargs, self._cache_name)
        keep = kwargs.get("logits_to_keep", 0)
        _hints.last_only = isinstance(keep, int) and keep == 1 and not kwargs.get("output_hidden_states")
        return args, kwargs


def _after_causal(model: Any, args: Any, output: Any) -> None:
    _hints.last_only = False


class _BeforeDecoder:
    """Turns the arguments of the decoder's forward into the `Call` that its blocks see."""

    def __init__(self, decoder: Any, layers: str, embeddings: str) -> None:
        self._layers = layers
        self._embeddings = embeddings
        self._names = list(inspect.signature(type(decoder).forward).parameters)[1:]
        self._cache_name = cache_argument(type(decoder).forward)
        self._blocks = len(getattr(decoder, layers))

    def __call__(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # Pushed first, because torch calls `_after_decoder`, which pops once, even if this raises.
        push(None)
        given = dict(zip(self._names, args, strict=False)) | kwargs
        _rename_cache(given, self._cache_name)
        cache = given.get(self._cache_name)
        check_inputs(
            given,
            vocabulary=len(getattr(decoder, self._embeddings).weight),
            past=length_of(cache) if isinstance(cache, Cache) else 0,
            model=decoder.config._name_or_path,
        )
        call = self._call(decoder, given)
        pop()
        push(call)
        return (), given

    def _call(self, decoder: Any, given: dict[str, Any]) -> Call:
        layers = list(getattr(decoder, self._layers)._modules.values())[: decoder.config.num_hidden_layers]
        wanted = given.get("output_hidden_states")
        read_before = _read_before(decoder, decoder.config.output_hidden_states if wanted is None else wanted)
        hidden = bool(read_before)
        runs = plan_runs(layers, read_before)
        mask = given.get("attention_mask")
        cache = self._cache(decoder, given, lazily=not hidden)
        ends_here = runs and isinstance(layers[-1], RemoteBlock) and not is_watched_after(layers[-1])
        last_only = bool(ends_here) and not hidden and getattr(_hints, "last_only", False)
        return Call(
            runs=tuple(runs),
            mask=None if mask is None else mask.bool(),
            positions=given.get("position_ids"),
            cache=cache,
            last_only=last_only,
            has_prompts=True,
        )

    def _cache(self, decoder: Any, given: dict[str, Any], *, lazily: bool) -> RemoteCache | None:
        """The call's cache, made or adopted; it replaces the one in `given`. Raises TypeError, ValueError."""
        cache = given.get(self._cache_name)
        if cache is not None:
            if not isinstance(cache, Cache):
                raise TypeError("a tuple of keys and values cannot hold those of remote blocks: leave the cache out")
            was_ours = isinstance(cache, RemoteCache)
            if not was_ours:
                # Before the cache becomes a remote one, so that an error leaves it as it was.
                check_prefix_mask(given.get("attention_mask"), length_of(cache))
            cache = RemoteCache.adopt(cache, self._blocks, max_rollback=ROLLBACK)
            if cache.prefix is not None and not was_ours:
                # peft gives a prefix in training too, where a pass brings its gradients.
                cache.lazy = torch.is_grad_enabled() or not given.get("use_cache")
        elif given.get("use_cache"):
            cache = RemoteCache(self._blocks)
        elif given.get("use_cache") is None and decoder.config.use_cache and lazily:
            # The caller did not request a cache, as in training and scoring, but may go on with the one that it gets.
            cache = RemoteCache(self._blocks, max_rollback=ROLLBACK)
            cache.lazy = True
        else:
            given["use_cache"] = False
            return None
        given[self._cache_name] = cache
        return cache


def _read_before(decoder: Any, wanted: bool | int | Sequence[int]) -> Collection[int]:
    """Before which blocks `output_hidden_states` reads values, as places in the decoder's list: all, some or none.

    Transformers counts them with the output of the last block. It takes single ones since 5.24 or so, of decoders
    whose outputs it records itself.
    """
    count = decoder.config.num_hidden_layers + 1
    if isinstance(wanted, bool) or not _SELECTS or "hidden_states" not in (decoder._can_record_outputs or {}):
        return range(count) if wanted else ()
    places = [wanted] if isinstance(wanted, int) else wanted
    return {place % count for place in places if -count <= place < count}


def _after_decoder(decoder: Any, args: Any, kwargs: Any, output: Any) -> None:
    pop()
