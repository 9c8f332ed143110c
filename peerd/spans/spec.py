"""What an operator asks to have served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peerd.compute.quantized.formats import NONE
from peerd.protocol.span import Span


@dataclass(frozen=True, slots=True)
class ServeSpec:
    """What an operator wants served. `model`: a path or a hub id, of which `revision` is the branch, tag or commit.
    `among`: instead of one model, patterns of those that we may choose from, of what the swarm serves (`org/*`, or
    paths).

    `blocks`: a span, how many, or None for all that fit. Which blocks, where no span is named, the swarm decides, now
    and, unless the peer is to `stay`, later.

    `dtype` defaults to the checkpoint's; `quantize` is how weights are stored: `none`, `int8` or `nf4`. `memory_bytes`
    bounds what serving takes beyond the program itself, on each device. `throughput`, in positions a second through
    one block, is announced instead of what is measured. `device` is torch's name; several, with commas between them,
    divide the blocks (`open_peer` and `Peer.serve` see to that).
    `adapters`: names, each with the directory that peft saved. `client_adapter_bytes`: how large an adapter a client
    may bring for its session; None for 64 MB, or less where memory is short; 0 for none.
    `uplink`: bytes a second that this machine can send, which clients then reckon with; None: as is measured.
    `look_every_s`: how often the peer looks whether it should move; None for every five minutes.
    `promised_bytes`: of the host's free memory, what others of the peer's spans may take yet; `Peer.serve` fills it in.
    """

    model: str | Path = ""
    blocks: Span | int | None = None
    dtype: str | None = None
    device: str = "cpu"
    kv_tokens: int | None = None
    memory_bytes: int | None = None
    quantize: str = NONE
    throughput: float | None = None
    revision: str | None = None
    adapters: tuple[tuple[str, str | Path], ...] = ()
    client_adapter_bytes: int | None = None
    stay: bool = False
    look_every_s: float | None = None
    among: tuple[str, ...] = ()
    uplink: int | None = None
    promised_bytes: int = 0
