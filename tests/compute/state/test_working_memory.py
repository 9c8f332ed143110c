"""Mixers hold no more memory at once than was counted for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import profile

from peerd.compute.families.layer_kinds import layer_kinds
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.state.mixer_cache import MixerCache
from peerd.compute.state.scans import scan_from
from tests.compute.tiny_families import or_skip, tiny_config


def most_live_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that `run` had at once, beside those that there were before."""
    with profile(profile_memory=True) as watched:
        run()
    found: Any = watched.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


# A convolution, both kinds of linear attention, and both kinds of state spaces.
@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "kimi_linear", "bamba", "mamba"])
def test_a_mixer_has_no_more_numbers_at_once_than_were_counted(name: str) -> None:
    family = FAMILIES[name]
    config = tiny_config(family)
    model = or_skip(family.decoder_type)._from_config(config).eval()
    number, state = next((number, kind.state) for number, kind in enumerate(layer_kinds(config)) if kind.state)
    mixer: Any = getattr(model, family.layers)[number].get_submodule(state.mixer)
    scan = scan_from(mixer, state.scan) if state.scan else None
    for rows, count in ((1, 256), (64, 1), (16, 2)):
        conv, recurrent = (*(torch.zeros(rows, *tensor.shape) for tensor in state.tensors), None)[:2]
        cache = MixerCache(conv, recurrent)
        if scan is not None:
            scan.initial = recurrent
        hidden = torch.randn(rows, count, state.width)
        with torch.inference_mode():
            used = most_live_bytes(lambda hidden=hidden, cache=cache: mixer(hidden, cache=cache))
        counted = rows * state.working_values(count) * torch.float32.itemsize
        assert counted / 8 < used <= counted
