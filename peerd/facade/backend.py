"""The swarm behind a model's remote blocks, and the prompts that a program trains beside them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from peerd.client.blocks import ServedBlocks
from peerd.client.session.session import Session
from peerd.client.training.training_pass import Pass
from peerd.facade.bridge import Bridge
from peerd.local.blocks import DaemonBlocks
from peerd.local.passes import DaemonPass
from peerd.local.session import DaemonSession
from peerd.protocol.encoding.tensors import DTYPES

AnyBlocks = ServedBlocks | DaemonBlocks
"""A model's blocks, used by a peer of this process or through a daemon."""
AnySession = Session | DaemonSession
AnyPass = Pass | DaemonPass


class Prompts(nn.Module):
    """Trained prompts: `length` positions before each row, and, if `deep`, values added to them in every block.

    prefix: `[length, width]`, as hidden states. deep: `[blocks, length, width]`, or None. Petals calls these `ptune`
        and `deep_ptune` (arXiv 2101.00190 and 2110.07602 describe the methods).
    """

    def __init__(self, blocks: int, length: int, width: int, *, deep: bool) -> None:
        super().__init__()
        self.length = length
        self.prefix = nn.Parameter(torch.randn(length, width) * 0.02)
        self.deep = nn.Parameter(torch.zeros(blocks, length, width)) if deep else None

    def states(self) -> list[object]:
        """Values that change whenever the prompts do; cheap to make."""
        return [None if each is None else each._version for each in (self.prefix, self.deep)]


class Backend:
    """A model's blocks in a swarm. It counts its uses: `sessions_opened`, `passes`, `steps`."""

    def __init__(self, bridge: Bridge, blocks: AnyBlocks) -> None:
        self.bridge = bridge
        self.blocks = blocks
        #: The decoder's remote layers, in the model's order.
        self.layers: Sequence[Any] = ()
        self.prompts: Prompts | None = None
        #: Called with the names of the adapters with which blocks are about to run; raises to refuse them.
        self.check_adapters: Callable[[Collection[str]], object] = set
        self.sessions_opened = 0
        self.passes = 0
        self.steps = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.blocks!r} sessions_opened={self.sessions_opened} passes={self.passes}>"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states on the wire."""
        return DTYPES[self.blocks.facts.dtype]

    @property
    def max_length(self) -> int:
        """How many positions a row may have."""
        return self.blocks.facts.max_length
