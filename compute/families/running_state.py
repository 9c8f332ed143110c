"""What blocks with a running state keep of a row: convolutions, state spaces and linear attention.

Such a block keeps tensors of fixed size instead of keys and values for each position. They say nothing of the
positions before: a row can go back only where its state was kept, or is computed again (`state.trails`). The module
that owns the state, its mixer, is Transformers' own; a family has here the mixer's name and the shapes of its state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of a row's state. `in_fp32`: it has that dtype whatever the model's is."""

    shape: tuple[int, ...]
    in_fp32: bool = False

    def values(self, itemsize: int) -> int:
        """How many numbers of `itemsize` bytes (the model's dtype) hold the tensor."""
        return prod(self.shape) * (4 // itemsize if self.in_fp32 else 1)


@dataclass(frozen=True, slots=True)
class RunningState:
    """The state of one block: that of its convolution, and that of its recurrence if it has one.

    mixer: the name of the module, inside the block, that owns it. width: that of the mixer's input. scan: the function
    of Transformers that computes the recurrence of several positions, if it always begins with a state of zeros
    (`state.scans`); empty if it goes on from the state before them. chunk: of how many positions a run of several is
    padded to a multiple. scratch: the numbers that the mixer makes for each position of such a run, beside those that
    go through the convolution.
    """

    mixer: str
    width: int
    conv: StateTensor
    recurrent: StateTensor | None = None
    scan: str = ""
    chunk: int = 1
    scratch: int = 0

    @property
    def tensors(self) -> tuple[StateTensor, ...]:
        """The tensors, the convolution's first."""
        return (self.conv,) if self.recurrent is None else (self.conv, self.recurrent)

    def working_values(self, count: int) -> int:
        """An upper bound of the fp32 numbers that the mixer has at once for a row of `count` new positions."""
        positions = 1 if count == 1 else -(-count // self.chunk) * self.chunk
        each = _COPIES * (self.conv.shape[0] + self.width) + (_SCRATCH_COPIES * self.scratch if count > 1 else 0)
        return positions * each + _STATE_COPIES * sum(prod(tensor.shape) for tensor in self.tensors)

    def rows_at_once(self, count: int, batch_tokens: int) -> int:
        """How many rows of `count` new positions may run together: at least one, and no more than take the memory that
        one row of `batch_tokens` positions takes, or a few decodes if they take more.
        """
        return max(self._allowed_values(batch_tokens) // self.working_values(count), 1)

    def most_working_values(self, batch_tokens: int) -> int:
        """The fp32 numbers that the mixer has at once in a batch of `batch_tokens` positions, at most."""
        return max(self._allowed_values(batch_tokens), self.working_values(batch_tokens))

    def _allowed_values(self, batch_tokens: int) -> int:
        return max(self.working_values(batch_tokens), _DECODES_AT_ONCE * self.working_values(1))


# How often Transformers' mixers, in torch, have at once: what goes through the convolution, the scratch numbers of a
# position, and a row's state. At most 0.7 of what this gives was measured (`tests/compute/state` repeats it).
_COPIES = 8
_SCRATCH_COPIES = 6
_STATE_COPIES = 6
# One run of a mixer reads its weights once, for so many rows that decode.
_DECODES_AT_ONCE = 16


def running_state(config: Any, layer_type: str) -> RunningState | None:
    """The state of a family's blocks of this type (a name from the configuration); None if they have none."""
    kept = _STATES.get((config.model_type, layer_type))
    return None if kept is None else kept(config)


def _short_convolution(config: Any) -> RunningState:
    width = int(config.hidden_size)
    return RunningState("conv", width, StateTensor((width, int(config.conv_L_cache))))


# The default of Transformers' functions, which no configuration changes.
_DELTA_CHUNK = 64


def _gated_delta_net(config: Any) -> RunningState:
    heads = int(config.linear_num_value_heads)
    keys = int(config.linear_num_key_heads) * int(config.linear_key_head_dim)
    values = heads * int(config.linear_value_head_dim)
    return RunningState(
        "linear_attn",
        int(config.hidden_size),
        StateTensor((2 * keys + values, int(config.linear_conv_kernel_dim))),
        StateTensor((heads, int(config.linear_key_head_dim), int(config.linear_value_head_dim)), in_fp32=True),
        chunk=_DELTA_CHUNK,
        # Keys and queries for each head of the values, and its products with the others of its chunk.
        scratch=heads * (2 * int(config.linear_key_head_dim) + _DELTA_CHUNK),
    )


def _kimi_delta(config: Any) -> RunningState:
    heads, width = int(config.linear_num_heads), int(config.linear_head_dim)
    return RunningState(
        "self_attn",
        int(config.hidden_size),
        StateTensor((3 * heads * width, int(config.linear_conv_kernel_dim))),
        StateTensor((heads, width, width), in_fp32=True),
        chunk=_DELTA_CHUNK,
        # Its products with the others of its chunk decay by channel.
        scratch=heads * _DELTA_CHUNK * width,
    )


def _mamba2(
    config: Any, mixer: str, heads: int, width: int, groups: int, size: int, kernel: int, chunk: int
) -> RunningState:
    """`size` numbers for each of the `width` channels of a head. All heads of a group have the same B and C, which run
    through the convolution beside the channels.
    """
    return RunningState(
        mixer,
        int(config.hidden_size),
        StateTensor((heads * width + 2 * groups * size, kernel)),
        StateTensor((heads, width, size), in_fp32=True),
        chunk=int(chunk),
        # B and C for each head, and its products with the others of its chunk.
        scratch=heads * (2 * size + int(chunk)),
    )


def _mamba2_alone(config: Any) -> RunningState:
    return _mamba2(
        config,
        "mixer",
        config.num_heads,
        config.head_dim,
        config.n_groups,
        config.state_size,
        config.conv_kernel,
        config.chunk_size,
    )


def _mamba2_in_hybrids(config: Any) -> RunningState:
    return _mamba2(
        config,
        "mamba",
        config.mamba_n_heads,
        config.mamba_d_head,
        config.mamba_n_groups,
        config.mamba_d_state,
        config.mamba_d_conv,
        config.mamba_chunk_size,
    )


def _mamba2_of_nemotron(config: Any) -> RunningState:
    return _mamba2(
        config,
        "mixer",
        config.mamba_num_heads,
        config.mamba_head_dim,
        config.n_groups,
        config.ssm_state_size,
        config.conv_kernel,
        config.chunk_size,
    )


def _mamba(config: Any, mixer: str, channels: int, size: int, kernel: int) -> RunningState:
    """`size` numbers for each channel."""
    return RunningState(
        mixer,
        int(config.hidden_size),
        StateTensor((channels, kernel)),
        StateTensor((channels, size), in_fp32=True),
        scan="mamba_selective_scan",
        # A state at each position.
        scratch=channels * size,
    )


def _mamba_alone(config: Any) -> RunningState:
    return _mamba(config, "mixer", int(config.intermediate_size), int(config.state_size), int(config.conv_kernel))


def _mamba_of_jamba(config: Any) -> RunningState:
    channels = int(config.mamba_expand) * int(config.hidden_size)
    return _mamba(config, "mamba", channels, int(config.mamba_d_state), int(config.mamba_d_conv))


_STATES: dict[tuple[str, str], Callable[[Any], RunningState]] = {
    ("lfm2", "conv"): _short_convolution,
    ("lfm2_moe", "conv"): _short_convolution,
    ("lfm3", "conv"): _short_convolution,
    ("qwen3_next", "linear_attention"): _gated_delta_net,
    ("qwen3_5_text", "linear_attention"): _gated_delta_net,
    ("qwen3_5_moe_text", "linear_attention"): _gated_delta_net,
    ("olmo_hybrid", "linear_attention"): _gated_delta_net,
    ("kimi_linear", "linear_attention"): _kimi_delta,
    ("bailing_hybrid", "linear_attention"): _kimi_delta,
    ("mamba2", "linear_attention"): _mamba2_alone,
    ("bamba", "linear_attention"): _mamba2_in_hybrids,
    ("granitemoehybrid", "linear_attention"): _mamba2_in_hybrids,
    ("falcon_h1", "hybrid"): _mamba2_in_hybrids,
    ("nemotron_h", "linear_attention"): _mamba2_of_nemotron,
    ("mamba", "linear_attention"): _mamba_alone,
    ("falcon_mamba", "linear_attention"): _mamba_alone,
    ("jamba", "linear_attention"): _mamba_of_jamba,
}
