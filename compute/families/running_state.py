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
    (`state.scans`); empty if it goes on from the state before them.
    """

    mixer: str
    width: int
    conv: StateTensor
    recurrent: StateTensor | None = None
    scan: str = ""

    @property
    def tensors(self) -> tuple[StateTensor, ...]:
        """The tensors, the convolution's first."""
        return (self.conv,) if self.recurrent is None else (self.conv, self.recurrent)


def running_state(config: Any, layer_type: str) -> RunningState | None:
    """The state of a family's blocks of this type (a name from the configuration); None if they have none."""
    kept = _STATES.get((config.model_type, layer_type))
    return None if kept is None else kept(config)


def _short_convolution(config: Any) -> RunningState:
    width = int(config.hidden_size)
    return RunningState("conv", width, StateTensor((width, int(config.conv_L_cache))))


def _gated_delta_net(config: Any) -> RunningState:
    heads = int(config.linear_num_value_heads)
    keys = int(config.linear_num_key_heads) * int(config.linear_key_head_dim)
    values = heads * int(config.linear_value_head_dim)
    return RunningState(
        "linear_attn",
        int(config.hidden_size),
        StateTensor((2 * keys + values, int(config.linear_conv_kernel_dim))),
        StateTensor((heads, int(config.linear_key_head_dim), int(config.linear_value_head_dim)), in_fp32=True),
    )


def _kimi_delta(config: Any) -> RunningState:
    heads, width = int(config.linear_num_heads), int(config.linear_head_dim)
    return RunningState(
        "self_attn",
        int(config.hidden_size),
        StateTensor((3 * heads * width, int(config.linear_conv_kernel_dim))),
        StateTensor((heads, width, width), in_fp32=True),
    )


def _mamba2(config: Any, mixer: str, heads: int, width: int, groups: int, size: int, kernel: int) -> RunningState:
    """`size` numbers for each of the `width` channels of a head. All heads of a group have the same B and C, which run
    through the convolution beside the channels.
    """
    return RunningState(
        mixer,
        int(config.hidden_size),
        StateTensor((heads * width + 2 * groups * size, kernel)),
        StateTensor((heads, width, size), in_fp32=True),
    )


def _mamba2_alone(config: Any) -> RunningState:
    return _mamba2(
        config, "mixer", config.num_heads, config.head_dim, config.n_groups, config.state_size, config.conv_kernel
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
    )


def _mamba(config: Any, mixer: str, channels: int, size: int, kernel: int) -> RunningState:
    """`size` numbers for each channel."""
    return RunningState(
        mixer,
        int(config.hidden_size),
        StateTensor((channels, kernel)),
        StateTensor((channels, size), in_fp32=True),
        scan="mamba_selective_scan",
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
