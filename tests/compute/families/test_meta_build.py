"""Tables that no checkpoint stores are filled by Transformers, or the model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peerd.compute.errors import UnsupportedModelError
from peerd.compute.families.meta_build import compute_buffers

CPU = torch.device("cpu")


class Decoder(nn.Module):
    """A decoder whose block has a table, which `_init_weights` fills when it is called for this module."""

    def __init__(self, filled_by: str) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
        self.filled_by = filled_by

    def _init_weights(self, module: nn.Module) -> None:
        if (module is self) == (self.filled_by == "decoder") and self.filled_by:
            self.block.get_buffer("table").fill_(2.0)


@pytest.mark.parametrize("filled_by", ["block", "decoder"])
def test_a_table_is_filled_wherever_transformers_fills_it(filled_by: str) -> None:
    config: Any = None
    decoder = Decoder(filled_by)
    compute_buffers(decoder, config, CPU)
    assert decoder.block.get_buffer("table").tolist() == [2.0, 2.0, 2.0]


def test_a_table_that_nothing_fills_is_an_error_and_no_leftover_of_the_memory() -> None:
    config: Any = None
    with pytest.raises(UnsupportedModelError, match=r"how to fill Module\.table"):
        compute_buffers(Decoder(""), config, CPU)
