"""The cache that a mixer of Transformers gets for the positions of some rows: their states before, and then after.

It answers what mixers of the supported releases ask a cache, whatever block they name: until 5.21 they read the states
from `layers`, since then through methods.
"""

from __future__ import annotations

from typing import Any

import torch


class MixerCache:
    """The states of one block, with a batch axis. The mixer replaces them by those after its input."""

    # The names that Transformers gives to what it asks for.
    record_past = False

    def __init__(self, conv: torch.Tensor, recurrent: torch.Tensor | None) -> None:
        self.conv_states: dict[int, torch.Tensor] = {0: conv}
        self.recurrent_states: dict[int, torch.Tensor | None] = {0: recurrent}
        self.layers = _Any(self)

    def states(self) -> tuple[torch.Tensor, ...]:
        """The convolution's state, and the recurrence's if there is one."""
        recurrent = self.recurrent_states[0]
        return (self.conv_states[0],) if recurrent is None else (self.conv_states[0], recurrent)

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        """A row without positions has a state too: zeros."""
        return True

    def is_recording_past(self, _layer: int) -> bool:
        """Going back is not the mixer's business."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        """The last inputs of the convolution, `[rows, channels, kernel]`. The mixer may write to it."""
        return self.conv_states[state_idx]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The recurrence's state before the input."""
        return self.recurrent_states[state_idx]

    def update_conv_state(self, new: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> torch.Tensor:
        """Add inputs `[rows, channels, positions]`. Returns them behind the last ones, which the convolution sees."""
        kept = self.conv_states[state_idx]
        seen = torch.cat([kept, new.to(kept.dtype)], dim=-1)
        self.conv_states[state_idx] = seen[..., -kept.shape[-1] :]
        return seen

    def update_recurrent_state(self, new: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> torch.Tensor:
        """Replace the recurrence's state."""
        self.recurrent_states[state_idx] = new
        return new


class _Any:
    """A list of blocks of which each is the same one."""

    def __init__(self, cache: MixerCache) -> None:
        self._cache = cache

    def __getitem__(self, _layer: int) -> MixerCache:
        return self._cache
