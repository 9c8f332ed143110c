"""Rotary position embeddings whose frequencies follow the length of a text.

The rope types `dynamic` and `longrope` choose their frequencies by the length of a sequence. Transformers takes the
longest position of each forward, so a neighbour, or a prompt that is cut into pieces, would change the result. Here
each position has a length of its own (`Segment.rope_lengths`): that of its session's prompt, or its own if it comes
later. These are the numbers that Transformers gives to a single answer, however long that answer may become.

Families lay out cos and sin differently. To reuse each family's own arithmetic, tokens are grouped by the
frequencies that they need, and the family's module runs once for each group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: One length for all tokens, or int64 lengths that broadcast to the shape of the position ids.
RopeLengths = int | torch.Tensor

# `dynamic` has other frequencies for each length, thus for each token of an answer.
_MOST_KEPT = 256

_Rule = tuple[str, int]  # rope type, and the longest length that it leaves unscaled


def length_rules(config: PreTrainedConfig) -> Mapping[str | None, _Rule]:
    """The model's ropes that depend on the length: by layer type, or under None if all layers share one."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_type = {None: parameters} if "rope_type" in parameters else parameters
    rules: dict[str | None, _Rule] = {}
    for layer_type, rope in by_type.items():
        kind = (rope or {}).get("rope_type")
        if kind == "longrope":
            rules[layer_type] = (kind, int(rope["original_max_position_embeddings"]))
        elif kind == "dynamic":
            rules[layer_type] = (kind, int(config.max_position_embeddings))
    return rules


def follow_length(config: PreTrainedConfig) -> bool:
    """Whether the model has ropes that depend on the length."""
    return bool(length_rules(config))


def changed_beyond(config: PreTrainedConfig) -> int | None:
    """The length beyond which `longrope` turns all positions otherwise; None if the model has no such rope.

    Keys that were cached before do not fit to those that come after it: a text that grows longer is computed again, as
    Transformers' `generate` does.
    """
    lengths = [length for kind, length in length_rules(config).values() if kind == "longrope"]
    return min(lengths, default=None)


def make_ropes_follow_lengths(decoder: nn.Module) -> None:
    """Replace each of the decoder's rotary embeddings that depends on the length by a LengthRotary."""
    for name, child in list(decoder.named_modules()):
        config: Any = getattr(child, "config", None)
        if type(child).__name__.endswith("RotaryEmbedding") and config is not None and length_rules(config):
            decoder.set_submodule(name, LengthRotary(child, config))


class LengthRotary(nn.Module):
    """Replaces rotary embeddings that depend on the length. Set `rope_lengths` before each forward."""

    def __init__(self, rotary: Any, config: PreTrainedConfig) -> None:
        super().__init__()
        self.rope_lengths: RopeLengths | None = None
        self._rotary = rotary
        #: Some decoders find their rotary embeddings by this attribute.
        self.config = config
        self._rules = length_rules(config)
        self._frequencies: dict[tuple[str | None, int], tuple[torch.Tensor, float]] = {}
        # The module's own wrapper rescales by the batch's longest position unless the rope type is another.
        kinds = rotary.rope_type
        rotary.rope_type = "default" if isinstance(kinds, str) else dict.fromkeys(kinds, "default")

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        """cos and sin for each position: [*position_ids.shape, width], in the dtype of `x`."""
        if layer_type not in self._rules:
            return self._rotary(x, position_ids, *self._arguments(layer_type))
        if self.rope_lengths is None:
            raise ValueError("this model's rotary embeddings follow the length of a text: pass rope_lengths")
        lengths = torch.as_tensor(self.rope_lengths, device=position_ids.device)
        groups = self._group(lengths, self._rules[layer_type])
        cos_sin: Any = None
        for group in self._groups(groups, self._rules[layer_type]):
            own = self._for_length(x, position_ids, layer_type, group)
            if cos_sin is not None:
                chosen = (groups == group)[..., None]
                own = tuple(torch.where(chosen, new, old) for new, old in zip(own, cos_sin, strict=True))
            cos_sin = own
        return cos_sin

    @staticmethod
    def _group(lengths: torch.Tensor, rule: _Rule) -> torch.Tensor:
        """One representative length for all lengths that need the same frequencies."""
        kind, unscaled = rule
        return lengths.clamp(unscaled, unscaled + 1) if kind == "longrope" else lengths.clamp(min=unscaled)

    @staticmethod
    def _groups(groups: torch.Tensor, rule: _Rule) -> list[int]:
        """The groups that may occur. For `longrope` both are computed: finding out which occur would make the host
        wait.
        """
        kind, unscaled = rule
        return [unscaled, unscaled + 1] if kind == "longrope" else torch.unique(groups).tolist()

    def _for_length(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None, length: int) -> Any:
        key = layer_type, length
        if key not in self._frequencies:
            if len(self._frequencies) >= _MOST_KEPT:
                self._frequencies.clear()
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            compute = ROPE_INIT_FUNCTIONS[self._rules[layer_type][0]]
            arguments = {} if layer_type is None else {"layer_type": layer_type}
            self._frequencies[key] = compute(self.config, position_ids.device, seq_len=length, **arguments)
        prefix = "" if layer_type is None else f"{layer_type}_"
        inv_freq, scaling = self._frequencies[key]
        setattr(self._rotary, f"{prefix}inv_freq", inv_freq)
        setattr(self._rotary, f"{prefix}attention_scaling", scaling)
        return self._rotary(x, position_ids, *self._arguments(layer_type))

    @staticmethod
    def _arguments(layer_type: str | None) -> tuple[str, ...]:
        """The layer type as arguments; families whose layers share one rope take none."""
        return () if layer_type is None else (layer_type,)
