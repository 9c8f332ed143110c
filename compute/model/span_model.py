"""A span of blocks as a model: Transformers' own decoder with its ends taken off.

The whole base model is built on the meta device, its layer list cut to the span, its final norm replaced by an
identity and its embeddings dropped; then only the span's tensors are read. So no architecture is written again here.
A decoder's forward also reads per-layer lists, which are sliced, and layer numbers, which start from 0 again; its
treatment of embeddings moves to the head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peerd.compute.attention.own_attention import install_own_attention, needs_own_attention
from peerd.compute.errors import UnsupportedModelError
from peerd.compute.families.family import Family
from peerd.compute.families.layer_kinds import LayerKind, layer_kinds
from peerd.compute.families.meta_build import build_on_meta, check_filled, compute_buffers
from peerd.compute.model.input_side import take_off_input_side
from peerd.compute.model.layer_loop import LayerLoop
from peerd.compute.model.load_blocks import load_block
from peerd.compute.model.rotary import LengthRotary, RopeLengths, make_ropes_follow_lengths
from peerd.compute.quantized.formats import NONE
from peerd.compute.transformers_compat import cache_argument
from peerd.protocol.span import Span

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from peerd.compute.checkpoint.checkpoint import Checkpoint


class SpanModel(nn.Module):
    """Blocks `span.start` to `span.end - 1`: hidden states in, hidden states out. Frozen, in evaluation mode.

    Layers are numbered from 0 within the span (`layer_idx`), so a cache holds the span's layers only.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        family: Family,
        span: Span,
        kinds: tuple[LayerKind, ...],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.family = family
        self.span = span
        #: The kind of each block of the span, in order.
        self.kinds = kinds
        #: The device on which the span lies.
        self.device = device
        #: The dtype in which the span computes, whatever its weights are stored as.
        self.dtype = dtype
        self._rotaries = tuple(part for part in decoder.modules() if isinstance(part, LengthRotary))
        self._loop = LayerLoop(decoder, self.layers)
        self._cache_argument = cache_argument(type(decoder).forward)

    @property
    def config(self) -> PreTrainedConfig:
        """The decoder's own configuration, with per-layer lists cut to the span."""
        return self.decoder.config

    @property
    def layers(self) -> nn.ModuleList:
        """The span's blocks."""
        layers: nn.ModuleList = getattr(self.decoder, self.family.layers)
        return layers

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def follows_length(self) -> bool:
        """Whether `forward` needs `rope_lengths`: the rotary embeddings follow a text's length."""
        return bool(self._rotaries)

    def forward(
        self,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Any = None,
        attention_mask: Any = None,
        *,
        rope_lengths: RopeLengths | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run hidden states [B, T, hidden_size] at positions [B, T] (int64) through the span: [B, T, hidden_size].

        cache: a Transformers cache, or any object with its `update`; None keeps nothing.
        rope_lengths: the length of the text for which ropes turn each token, if they follow it: an int, or int64 that
            broadcasts to [B, T]. None uses each row's longest position, as Transformers does.
        kwargs: passed to the attention function.
        """
        for rotary in self._rotaries:
            rotary.rope_lengths = position_ids.amax(-1, keepdim=True) + 1 if rope_lengths is None else rope_lengths

        def run_decoder() -> torch.Tensor:
            output = self.decoder(
                inputs_embeds=hidden,
                position_ids=position_ids,
                attention_mask=attention_mask,
                use_cache=cache is not None,
                **{self._cache_argument: cache},
                **kwargs,
            )
            result: torch.Tensor = output.last_hidden_state
            return result

        # A Transformers cache needs masks, which the decoder must make in each call.
        ours = cache is not None and not getattr(cache, "needs_mask", True)
        if not ours or attention_mask is not None or kwargs or torch.is_grad_enabled():
            output = run_decoder()
        else:
            output = self._loop.run(run_decoder, hidden, position_ids, cache)
        # Mamba's blocks add to hidden states in fp32, whatever the model's dtype.
        return output.to(self.dtype)

    def forward_no_cache(self, hidden: torch.Tensor, max_length: int | None = None) -> torch.Tensor:
        """Run whole sequences [B, T, hidden_size] from position 0 without a cache. Gradients flow to `hidden`."""
        positions = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        return self.forward(hidden, positions, rope_lengths=max_length)


def load_span(
    checkpoint: Checkpoint,
    span: Span,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    quantize: str = NONE,
    on_block: Callable[[int], None] | None = None,
) -> SpanModel:
    """Read a span's blocks onto `device`, in `dtype` (the checkpoint's own if None).

    attention: `eager`, `sdpa`, a name registered with `AttentionInterface`, or None for the best that Transformers
        has; a family without that interface uses its own.
    quantize: `none`, `packed`, `int8` or `nf4`: how linear layers and experts are stored (they compute in `dtype`).
    on_block: called with each block's number once it is read.

    Raises CheckpointError for anything missing, UnsupportedModelError, and IndexError for a span that the model does
    not have.
    """
    if span.end > checkpoint.block_count:
        raise IndexError(f"{checkpoint.name} has {checkpoint.block_count} blocks: there is no span {span}")
    family, device = checkpoint.family, torch.device(device)
    own = attention if needs_own_attention(family) and attention not in (None, "eager", "sdpa") else None
    attention = attention if family.attention_interface and not own else None
    dtype = dtype or checkpoint.dtype
    decoder = build_on_meta(family.decoder_type(), checkpoint.config, dtype, attention)
    kinds = layer_kinds(checkpoint.config)[span.start : span.end]
    _cut(decoder, family, span)
    if any(kind.latent for kind in kinds) and not any(hasattr(part, "expand_kv") for part in decoder.modules()):
        raise UnsupportedModelError(
            f"{family.model_type} needs a newer Transformers: the installed one does not cache latents"
        )
    if quantize != NONE:
        # Transformers' other ways to run experts need all of them as one plain tensor.
        decoder.set_experts_implementation("eager")
    layers: nn.ModuleList = getattr(decoder, family.layers)
    for layer, block in zip(layers, range(span.start, span.end), strict=True):
        load_block(layer, checkpoint, block, device, quantize)
        if on_block is not None:
            on_block(block)
    compute_buffers(decoder, decoder.config, device)
    check_filled(decoder, checkpoint.path)
    if own:
        install_own_attention(decoder, own, device, dtype)
    make_ropes_follow_lengths(decoder)
    return SpanModel(decoder, family, span, kinds, device=device, dtype=dtype).eval()


def _cut(decoder: PreTrainedModel, family: Family, span: Span) -> None:
    layers: nn.ModuleList = getattr(decoder, family.layers)
    config = decoder.config
    slice_lists(config, len(layers), span)
    setattr(decoder, family.layers, layers[span.start : span.end])
    for index, layer in enumerate(layers[span.start : span.end]):
        parts: Iterator[Any] = layer.modules()
        for module in parts:
            for number in ("layer_idx", "layer_id"):
                if hasattr(module, number):
                    setattr(module, number, index)
    setattr(decoder, family.norm, nn.Identity())
    setattr(decoder, family.embeddings, None)
    take_off_input_side(decoder, family)
    if family.project_out:
        setattr(decoder, family.project_out, None)


def slice_lists(config: PreTrainedConfig, block_count: int, span: Span) -> None:
    """Cut the configuration's per-layer lists (`layer_types` and the like), which forward reads by the new numbers."""
    _store_computed_lists(config, block_count)
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == block_count:
            setattr(config, name, value[span.start : span.end])
    config.num_hidden_layers = len(span)


def _store_computed_lists(config: PreTrainedConfig, block_count: int) -> None:
    """Store the per-layer lists that the configuration computes at each access, as Jamba's and Bamba's do.

    They compute them from the number of blocks, so in a span every list would begin with block 0.
    """
    kind = type(config)
    computed = {name for base in kind.__mro__ for name, found in vars(base).items() if isinstance(found, property)}
    lists = {name: getattr(config, name) for name in computed if "layer" in name}
    lists = {name: value for name, value in lists.items() if isinstance(value, list) and len(value) == block_count}
    if lists:
        # The class of this one configuration, without the properties that would hide what is stored.
        config.__class__ = type(kind.__name__, (kind,), dict.fromkeys(lists))
        for name, value in lists.items():
            setattr(config, name, value)


def part_of(model: SpanModel, blocks: Span) -> SpanModel:
    """The model of some of a span's blocks, sharing the weights. Layers keep their numbers, which caches use."""
    part = Span(blocks.start - model.span.start, blocks.end - model.span.start)
    decoder = copy.copy(model.decoder)
    decoder._modules = dict(decoder._modules)
    decoder.config = copy.deepcopy(model.config)
    slice_lists(decoder.config, len(model.span), part)
    setattr(decoder, model.family.layers, model.layers[part.start : part.end])
    kinds = model.kinds[part.start : part.end]
    return SpanModel(decoder, model.family, blocks, kinds, device=model.device, dtype=model.dtype).eval()
