"""The operator's wishes for serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span

#: What may compute a server's blocks: our own engine over torch, or llama.cpp; by itself peerd chooses one of them.
AUTO, TORCH, LLAMACPP = ENGINES = ("auto", "torch", "llamacpp")


@dataclass(frozen=True, slots=True)
class Trainable:
    """Who may train a copy of our blocks, and how far.

    peers: the clients. folder: where their snapshots are kept. max_rate: the greatest learning rate. max_steps: how
    many steps a copy may be away from the published weights.
    """

    peers: frozenset[PeerId]
    folder: Path
    max_rate: float = 1e-3
    max_steps: int = 10_000


@dataclass(frozen=True, slots=True)
class ServeSpec:
    """What the operator wants served.

    model: a path or a hub id; `revision` is its branch, tag or commit.
    among: instead of a model, patterns of the models that may be served, of those in the swarm (`org/*`, or paths).
    blocks: a span, a number of blocks, or None for all that fit. If no span is named, the swarm's need decides which
        blocks, now and, unless `stay` is set, later too.
    engine: what computes: `torch`, `llamacpp`, or `auto` for llama.cpp where it is installed and torch would
        dequantize a GGUF file that it can serve.
    dtype: for computing; defaults to the checkpoint's.
    quantize: how weights are stored: `none`, `packed` (as a quantized file has them), `int8` or `nf4`; None for
        `packed` where the file allows it, this CPU is faster so and no dtype is named, else `none`.
    memory_bytes: the limit for what serving takes beyond the program itself, on each device.
    throughput: announced instead of the measured one, in positions a second through one block.
    device: torch's name. Several, separated by commas, divide the blocks (`open_peer` and `Peer.serve` see to that).
    adapters: names, each with the directory that peft saved, or its hub id.
    any_base: serve adapters that were trained for another model too, such as another quantization of this one.
    client_adapter_bytes: the largest adapter that a client may upload for its session; None for 64 MB, or less if
        memory is short; 0 for none.
    share: of the device's time, how much serving may take; a measured throughput is announced accordingly.
    uplink: bytes a second that this machine can send, which clients use for planning; None for the measured value.
    look_every_s: how often the peer checks whether it should move; None for every five minutes.
    promised_bytes: the host memory that other spans of this peer may still take; `Peer.serve` fills it in.
    head: whether to draw tokens too, for sessions whose last hop this is; None: in a private swarm, if the head takes
        little of the memory. `Peer.serve` decides for a swarm that is open to everybody: not by itself.
    trainable: who may train a copy of the blocks; None: nobody.
    hub: how adapters are fetched; `Peer.serve` fills it in.
    """

    model: str | Path = ""
    blocks: Span | int | None = None
    dtype: str | None = None
    device: str = "cpu"
    kv_tokens: int | None = None
    memory_bytes: int | None = None
    quantize: str | None = None
    throughput: float | None = None
    revision: str | None = None
    adapters: tuple[tuple[str, str | Path], ...] = ()
    any_base: bool = False
    client_adapter_bytes: int | None = None
    stay: bool = False
    look_every_s: float | None = None
    among: tuple[str, ...] = ()
    uplink: int | None = None
    share: float = 1.0
    promised_bytes: int = 0
    trainable: Trainable | None = None
    hub: HubSettings | None = None
    engine: str = AUTO
    head: bool | None = None
