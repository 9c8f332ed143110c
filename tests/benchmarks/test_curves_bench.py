"""`make bench-curves`, shortened: losses through a swarm are those of local training, whatever is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import peerd
from benchmarks.training.curves import METHODS, Training, small_llama
from tests.peerd.facade.conftest import Servers

pytest.importorskip("peft")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.slow,
    # Of peft and Trainer among themselves; local models meet the same.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("llama"), blocks=4, width=32)


@pytest.fixture(scope="module")
def servers(path: Path) -> Iterator[Servers]:
    with ExitStack() as stack:
        serving = Servers()
        stack.callback(serving.close)
        serving.serve(path, (0, 2), (2, 4))
        yield serving


@pytest.mark.parametrize("method", METHODS)
def test_a_curve_through_the_swarm_is_the_local_one(method: str, path: Path, servers: Servers) -> None:
    ids = torch.randint(0, 260, (2, 12), generator=torch.Generator().manual_seed(0))
    open_remote = partial(peerd.RemoteModelForCausalLM.from_pretrained, path, bootstrap=servers.bootstrap)

    def open_local() -> Any:
        return LlamaForCausalLM.from_pretrained(path)

    curve = METHODS[method](open_remote, open_local, Training(ids, steps=6))
    assert len(curve.swarm) == 6
    assert curve.apart < 1e-3
    assert curve.rounding < 1e-3
    assert curve.swarm[-1] < curve.swarm[0] - 10 * curve.apart
