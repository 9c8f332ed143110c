"""Runs decodes over fixed buffers, so that on CUDA a whole span is one recorded graph.

At batch size 1 a block's kernels take less time than launching them; a graph launches all kernels of a span at once.
A graph has fixed shapes and addresses. So a decode is padded to the next bucket of rows and of page-table width, and
its numbers (positions, pages, lengths) are copied into that bucket's buffers. On other devices the same buffers are
run without a graph, which is how this is tested.

A block that asks the device for a number (some routed experts, some quantized layers) makes the host wait and cannot
be recorded. That is found by watching a run, once for each set of blocks; such blocks then run like any other batch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from peerd.compute.attention.attention import SpanAttention
from peerd.compute.device.sizes import format_size
from peerd.compute.device.staging import Staging
from peerd.compute.engine.decode_rows import DecodeRows, is_short
from peerd.compute.engine.paged_views import DecodeView
from peerd.compute.engine.recordable import WaitWatcher
from peerd.compute.kv.pool import KVPool
from peerd.compute.model.span_model import SpanModel
from peerd.compute.steps import Segment
from peerd.protocol.span import Span

log = logging.getLogger(__name__)

#: Rows of a decode, padding included. A batch with more rows than the last is not treated as a decode.
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
#: Positions of the longest row. The kernel's work follows the rows' own lengths; only its number of parts, and the copy
#: of the page tables, follow this bucket.
LENGTH_BUCKETS = (1024, 8192, 65536, 1 << 20)
# Recorded before the first session: every number of rows, at the lengths that most sessions have.
WARM_LENGTHS = LENGTH_BUCKETS[:2]
# Graphs and buffers that are kept: those of the whole span, and of some parts of it that clients ask for. Each client
# may ask for other parts, and what has not run for longest goes first.
MOST_RECORDED = 64
# A bucket that could not be recorded, for lack of memory perhaps, is tried again after so many decodes without it.
RETRY_AFTER = 1024
# In a first run libraries choose their algorithms and Triton compiles; that run is also watched for waits. One more run
# shows that nothing is left to do.
_WARM_UP_RUNS = 1
# torch.cuda's streams have no types.
_CUDA: Any = torch.cuda
# While torch records, it waits for the device, which no other thread may do then. A process has one CUDA context.
_RECORDING = threading.Lock()


@dataclass(frozen=True, slots=True)
class GraphShape:
    """The blocks and the shape for which a graph is made."""

    blocks: Span
    rows: int
    width: int


class _Recorded:
    """One bucket's buffers, and its graph if there is one."""

    def __init__(self, rows: DecodeRows, hidden: torch.Tensor) -> None:
        self.rows = rows
        self.hidden = hidden
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output = hidden


class DecodeGraphs:
    """The decode graphs of one engine. `model` returns the part of the span with the given blocks."""

    def __init__(
        self,
        model: Callable[[Span], SpanModel],
        whole: SpanModel,
        pool: KVPool,
        attention: SpanAttention,
        staging: Staging,
    ) -> None:
        self.graph_bytes = 0
        self._model = model
        self._whole = whole
        self._pool = pool
        self._attention = attention
        self._staging = staging
        self._records = pool.device.type == "cuda"
        self._recorded: dict[GraphShape, _Recorded] = {}
        # Blocks that wait for the device, and so can never be recorded.
        self._refused: set[Span] = set()
        # Buckets that could not be recorded, and for how many more decodes they are left out.
        self._failed: dict[GraphShape, int] = {}
        # Graphs run one after the other, so they can share memory for activations.
        self._memory = torch.cuda.graph_pool_handle() if self._records else None
        # Torch's own stream for recording belongs to the device that recorded first.
        self._aside: Any = _CUDA.Stream(pool.device) if self._records else None

    def __repr__(self) -> str:
        refused = sorted(self._refused, key=str)
        return f"<DecodeGraphs {len(self._recorded)} buckets, {len(self._failed)} failed, refused={refused}>"

    def takes(self, blocks: Span, segments: Sequence[Segment]) -> bool:
        """Whether these segments are a decode for which buffers can be used."""
        if not segments or blocks in self._refused:
            return False
        if any(segment.adapter or not is_short(segment) for segment in segments):
            return False
        return sum(segment.count for segment in segments) <= ROW_BUCKETS[-1]

    def run(self, blocks: Span, segments: Sequence[Segment], parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Run a decode that `takes` accepted: `[positions, hidden_size]` on the device, valid until the next run.

        Returns None if this cannot be recorded, now or ever.
        """
        count = sum(segment.count for segment in segments)
        pages = max(len(row_pages.pages) for segment in segments for row_pages in segment.groups)
        recorded = self._bucket(blocks, count, pages)
        if recorded is None:
            return None
        recorded.rows.fill(segments)
        self._staging.send(recorded.rows.host, recorded.rows.device)
        self._staging.send(self._staging.gather(parts, recorded.rows.rows), recorded.hidden)
        if recorded.graph is not None:
            recorded.graph.replay()
        else:
            recorded.output = self._forward(blocks, recorded)
        return recorded.output[:count]

    def warm_up(self) -> None:
        """Record the graphs that most decodes of the whole span need. The largest come first; the others fit into their
        memory.
        """
        if not self._records:
            return
        log.info("recording CUDA graphs of blocks %s for decodes of up to %d rows", self._whole.span, ROW_BUCKETS[-1])
        for length in WARM_LENGTHS:
            for rows in reversed(ROW_BUCKETS):
                self._bucket(self._whole.span, rows, self._width(length))
                if self._whole.span in self._refused:
                    return
        log.info("%d CUDA graphs take %s", len(self._recorded), format_size(self.graph_bytes))

    def forget(self, blocks: Span) -> None:
        """Drop what was recorded of these blocks."""
        self._recorded = {bucket: recorded for bucket, recorded in self._recorded.items() if bucket.blocks != blocks}
        self._failed = {bucket: left for bucket, left in self._failed.items() if bucket.blocks != blocks}
        self._refused.discard(blocks)

    def _bucket(self, blocks: Span, count: int, pages: int) -> _Recorded | None:
        rows = next(bucket for bucket in ROW_BUCKETS if bucket >= count)
        width = next((width for width in map(self._width, LENGTH_BUCKETS) if width >= pages), pages)
        bucket = GraphShape(blocks, rows, width)
        recorded = self._recorded.pop(bucket, None)
        if recorded is None:
            if self._failed.get(bucket, 0):
                self._failed[bucket] -= 1
                return None
            recorded = self._make(bucket)
            if recorded is None:
                self._failed[bucket] = RETRY_AFTER
                return None
            self._failed.pop(bucket, None)
            while len(self._recorded) >= MOST_RECORDED:
                self._recorded.pop(next(iter(self._recorded)))
        # The last in the dict is the one that ran last.
        self._recorded[bucket] = recorded
        return recorded

    def _width(self, length: int) -> int:
        return -(-length // self._pool.page_tokens)

    def _make(self, bucket: GraphShape) -> _Recorded | None:
        hidden = torch.zeros(bucket.rows, self._whole.hidden_size, device=self._pool.device, dtype=self._whole.dtype)
        recorded = _Recorded(DecodeRows(self._pool, bucket.rows, bucket.width), hidden)
        # All rows are padding, so that recording disturbs no session.
        recorded.rows.fill(())
        self._staging.send(recorded.rows.host, recorded.rows.device)
        if self._records:
            with _RECORDING:
                if not self._record(bucket, recorded):
                    return None
        return recorded

    def _record(self, bucket: GraphShape, recorded: _Recorded) -> bool:
        """Record the bucket's graph. Returns whether that was possible."""
        device = self._pool.device
        current = _CUDA.current_stream(device)
        before, _ = torch.cuda.mem_get_info(device)
        try:
            self._aside.wait_stream(current)
            with torch.cuda.stream(self._aside):
                waits = self.waits_for(bucket.blocks, recorded)
                for _ in range(_WARM_UP_RUNS):
                    self._forward(bucket.blocks, recorded)
            current.wait_stream(self._aside)
            if waits:
                self._refused.add(bucket.blocks)
                log.info("blocks %s decode without CUDA graphs: they wait for %s", bucket.blocks, ", ".join(waits))
                return False
            graph = torch.cuda.CUDAGraph()
            # Other engines' threads may use the device meanwhile; only our own thread must not wait for it.
            with torch.cuda.graph(graph, self._memory, self._aside, capture_error_mode="thread_local"):
                recorded.output = self._forward(bucket.blocks, recorded)
        except torch.cuda.OutOfMemoryError as error:
            log.warning("no memory now for the CUDA graph of %s, which decodes slower without: %s", bucket, error)
            return False
        except (RuntimeError, NotImplementedError) as error:
            # Torch has no narrower error for "not while recording".
            log.info("%s cannot be recorded now, so it decodes without a CUDA graph: %s", bucket, error)
            torch.cuda.synchronize(device)
            return False
        finally:
            # If a recording failed, torch leaves its stream as the thread's current one.
            _CUDA.set_stream(current)
        recorded.graph = graph
        after, _ = torch.cuda.mem_get_info(device)
        self.graph_bytes += max(before - after, 0)
        return True

    def waits_for(self, blocks: Span, recorded: _Recorded) -> list[str]:
        """The operations of a decode for which the host waits; with any of them it cannot be recorded."""
        # What a first run of all prepares, such as tables of rotary embeddings, no later run waits for.
        self._forward(blocks, recorded)
        with WaitWatcher() as watcher:
            self._forward(blocks, recorded)
        return sorted(watcher.seen)

    def _forward(self, blocks: Span, recorded: _Recorded) -> torch.Tensor:
        """Run the blocks over the bucket's buffers. Reads nothing else, and asks the device for nothing."""
        model = self._model(blocks)
        view = DecodeView(self._pool, recorded.rows)
        rope_lengths = recorded.rows.rope_lengths if model.follows_length else None
        self._attention.view = view
        try:
            output = model.forward(recorded.hidden[None], view.positions, view, rope_lengths=rope_lengths)
        finally:
            self._attention.view = None
        return output.squeeze(0)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the thread's current one, which streams, graphs and libraries use."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
