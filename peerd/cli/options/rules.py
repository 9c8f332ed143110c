"""What a daemon was asked to be, as its options say it, and which options need or exclude each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peerd.cli.options.parsing import is_loopback
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span

if TYPE_CHECKING:
    from peerd.cli.options.shared import JoinOptions
    from peerd.reach.relay_ledger import RelayLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How blocks are served. What is not given is None, empty or False."""

    dtype: str | None = None
    devices: tuple[str, ...] = ()
    kv_tokens: int | None = None
    memory_bytes: int | None = None
    quantize: str | None = None
    engine: str = "auto"
    throughput: float | None = None
    adapters: tuple[tuple[str, str | Path], ...] = ()
    any_base: bool = False
    client_adapter_bytes: int | None = None
    stay: bool = False
    look_every_s: float | None = None
    uplink: int | None = None
    trainable: tuple[PeerId, ...] = ()
    trainable_rate: float | None = None
    trainable_steps: int | None = None
    idle_only: bool = False
    nice: int | None = None
    gpu_share: float | None = None
    serve_head: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiOptions:
    """Where the local API is offered, and to which programs."""

    client: bool = False
    socket_path: Path | None = None
    http: tuple[str, int] | None = None
    token_file: Path | None = None
    no_token: bool = False
    open_page: bool = False
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    keep_positions: int = 0
    drafts: tuple[tuple[str | None, Path | str], ...] = ()
    draft_device: str | None = None
    traces: bool = False
    remote_head: bool = False

    @property
    def is_offered(self) -> bool:
        """Whether there is a local API at all."""
        return self.client or self.socket_path is not None or self.http is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonOptions:
    """All options of a daemon, parsed."""

    joining: JoinOptions
    serve_blocks: Span | int | str | None = None
    models: tuple[tuple[str | None, Path | str], ...] = ()
    among: tuple[str, ...] = ()
    revision: str | None = None
    disk_bytes: int | None = None
    serving: ServingOptions = field(default_factory=ServingOptions)
    api: ApiOptions = field(default_factory=ApiOptions)
    listen: tuple[Multiaddr, ...] = ()
    announce: tuple[Multiaddr, ...] = ()
    identity: Path | None = None
    relay: RelayLimits | None = None
    audit: float | None = None
    audit_limits: Path | None = None
    no_mdns: bool = False
    stop_on_eof: bool = False

    @property
    def meets_neighbours(self) -> bool:
        """Whether peers in the local network find it; not one that listens on this machine alone."""
        return not self.no_mdns and not (self.listen and all(one.is_loopback for one in self.listen))

    @property
    def serves(self) -> bool:
        """Whether it runs blocks for others."""
        return self.serve_blocks is not None

    @property
    def accepts(self) -> bool:
        """Whether others can dial it."""
        return self.serves or bool(self.listen)

    @property
    def names_a_span(self) -> bool:
        """Whether the operator, and not the swarm, says which blocks."""
        return isinstance(self.serve_blocks, Span)


Rule = tuple[Callable[[DaemonOptions], object], str]
"""When it is true of the options, they are refused with the message."""

RULES: tuple[Rule, ...] = (
    (
        lambda options: options.among and (options.models or not options.serves or options.names_a_span),
        "--models lets the swarm decide: say --serve-blocks auto or N with it, and no --model",
    ),
    (
        lambda options: options.serves and len(options.models) != 1 and not options.among,
        "--serve-blocks says which blocks, --model of which one model: give each once",
    ),
    (
        lambda options: options.revision and options.among,
        "--revision is for --model: of --models, the swarm says which commit it serves",
    ),
    (
        lambda options: (options.revision or options.disk_bytes) and not (options.models or options.among),
        "--revision and --disk are for models: add --model",
    ),
    (
        lambda options: options.revision and len(options.models) > 1,
        "--revision is for one --model; with several, write each as org/name@revision",
    ),
    (
        lambda options: options.models and not options.serves and not options.api.is_offered,
        "--model is for --serve-blocks, or for the local API: add --client, --socket or --http",
    ),
    (
        lambda options: not options.serves and options.serving != ServingOptions(),
        "--dtype, --device, --kv-tokens, --memory, --quantize, --engine, --throughput, --adapter, --any-base,"
        " --client-adapters, --uplink, --trainable, --look-every, --no-move, --idle-only, --nice, --gpu-share and"
        " --serve-head say how to serve: add --serve-blocks",
    ),
    (
        lambda options: (
            options.serving.gpu_share is not None and not any("cuda" in device for device in options.serving.devices)
        ),
        "--gpu-share is for --device cuda, whose programs take turns: on a CPU use --nice",
    ),
    (
        lambda options: options.serving.trainable and not (options.names_a_span or options.serving.stay),
        "--trainable is for blocks that stay: name them, --serve-blocks A:B, or add --no-move",
    ),
    (
        lambda options: (
            not options.serving.trainable
            and (options.serving.trainable_rate is not None or options.serving.trainable_steps is not None)
        ),
        "--trainable-rate and --trainable-steps limit those whom --trainable names: add it",
    ),
    (
        lambda options: not (options.accepts or options.api.is_offered),
        "nothing to do: give --serve-blocks with --model, --client, or --listen",
    ),
    (
        lambda options: (options.audit is not None or options.audit_limits) and not options.api.is_offered,
        "--audit and --audit-limits are for the answers that programs on this machine get: add --client",
    ),
    (
        lambda options: (
            (options.api.token_file or options.api.no_token or options.api.names or options.api.origins)
            and options.api.http is None
        ),
        "--token-file, --no-token, --allow-host and --allow-origin are for --http HOST:PORT: add it",
    ),
    (
        lambda options: options.api.no_token and options.api.http and not is_loopback(options.api.http[0]),
        "--no-token would open the address of --http to the network: say 127.0.0.1, ::1 or localhost there",
    ),
    (
        lambda options: options.announce and not options.accepts,
        "--announce needs --listen: peers that dial the address must reach this one",
    ),
    (
        lambda options: options.relay and not options.accepts,
        "--relay needs --listen: the peers for which it relays must reach this one",
    ),
    (
        lambda options: (
            len({name for name, _ in options.models if name}) < sum(1 for name, _ in options.models if name)
        ),
        "two of --model have the same NAME: give each its own, --model NAME=MODEL",
    ),
    (
        lambda options: options.api.drafts and not (options.api.is_offered and options.models),
        "--draft guesses for the models that the local API offers: add --client and --model",
    ),
    (
        lambda options: options.api.remote_head and not (options.api.is_offered and options.models),
        "--remote-head is for the models that the local API offers: add --client and --model",
    ),
    (
        lambda options: options.api.traces and not options.api.is_offered,
        "--traces are of the answers that programs on this machine get: add --client",
    ),
    (
        lambda options: options.api.draft_device and not options.api.drafts,
        "--draft-device is for --draft MODEL: add it",
    ),
    (
        lambda options: len(options.models) > 1 and any(name is None for name, _ in options.api.drafts),
        "--draft must say for which --model it guesses: --draft NAME=MODEL",
    ),
    (
        lambda options: len({name for name, _ in options.api.drafts}) < len(options.api.drafts),
        "two of --draft guess for the same model: give one of them",
    ),
)


def broken_rule(options: DaemonOptions) -> str | None:
    """The message of the first rule that the options break; None where they fit each other."""
    return next((message for is_broken, message in RULES if is_broken(options)), None)
