"""The memory of a cache that nobody has written to goes back to the system, and the cache works as before."""

from __future__ import annotations

import ctypes
import mmap
import tempfile
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch

from peerd.compute.llamacpp.engine import LlamaEngine
from peerd.compute.llamacpp.span_model import LlamaSpan
from peerd.compute.llamacpp.untouched import TAKES_BACK, give_back_zeros
from peerd.protocol.span import Span
from tests.compute.llamacpp.conftest import needs_llamacpp

pytestmark = pytest.mark.skipif(not TAKES_BACK, reason="this system takes no pages back")


def resident_bytes(ranges: Iterable[tuple[int, int]]) -> int:
    """How many bytes of the whole pages in these ranges take memory now."""
    total = 0
    for first, end in ranges:
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = (end // mmap.PAGESIZE * mmap.PAGESIZE - start) // mmap.PAGESIZE
        seen = (ctypes.c_ubyte * pages)()
        assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE), seen)
        total += mmap.PAGESIZE * sum(bytes(seen))
    return total


def test_pages_that_are_given_back_take_no_memory_and_read_as_zeros() -> None:
    memory = np.ones(16 << 20, np.uint8)
    first = memory.ctypes.data
    beyond = memory[-100:].copy()
    given = give_back_zeros([(first + 100, first + memory.nbytes - 100)])
    assert (16 << 20) - 3 * mmap.PAGESIZE <= given < 16 << 20
    assert resident_bytes([(first + mmap.PAGESIZE, first + given)]) == 0
    assert memory[:100].all()
    assert (memory[-100:] == beyond).all()
    assert int(memory.sum()) == memory.nbytes - given


def test_memory_of_a_file_is_left_alone() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * (1 << 20))
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
            first = ctypes.addressof(view)
            assert give_back_zeros([(first, first + len(mapped))]) == 0
            del view


@needs_llamacpp
def test_a_cache_takes_memory_as_positions_come(
    llama_engine: Callable[..., LlamaEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama_engine(Span(2, 6), kv_tokens=4096)
    caches = engine._model._graph.caches.values()
    assert len(caches) == 2 * len(engine.span)
    whole = sum(end - first for first, end in caches)
    assert resident_bytes(caches) < whole / 4
    hidden = torch.randn(1, 30, engine.hidden_size) * 0.3
    monkeypatch.setattr(LlamaSpan, "give_back_cache", lambda _: 0)
    full = llama_engine(Span(2, 6), kv_tokens=4096)
    assert resident_bytes(full._model._graph.caches.values()) > whole * 0.9
    assert torch.equal(engine.forward(hidden), full.forward(hidden))
