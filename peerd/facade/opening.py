"""Opens a model's blocks for the facade, over a peer of its own or a daemon's, inside the bridge's loop."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import trio

from peerd.checkpoints import Checkpoints, fetch_head
from peerd.client.blocks import ServedBlocks
from peerd.client.open_model import facts_of
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.local.blocks import DaemonBlocks, open_daemon_blocks
from peerd.local.socket_path import default_socket_path
from peerd.peer import open_peer

# Options of `open_peer` that do not concern clients.
_OF_SERVERS = {"serve", "listen", "announce", "relay"}
# What programs give to Transformers' or Petals' from_pretrained, and what to do here.
_OF_HUB = "hub=peerd.HubSettings(...) and the environment say how the hub is used"
_OF_WEIGHTS = "servers choose how they store their blocks (peerd --quantize)"
_INSTEAD = {
    "torch_dtype": "say dtype, for the head; blocks compute in what their servers were started with",
    "device_map": "say device, for the head; blocks lie on their servers",
    "gguf_file": "name the file itself, by its path or as org/name/file.gguf",
    "quantization_config": _OF_WEIGHTS,
    "load_in_4bit": _OF_WEIGHTS,
    "load_in_8bit": _OF_WEIGHTS,
    "attn_implementation": "servers compute the attention; leave it out",
    "trust_remote_code": "peers run no code that comes with a model; leave it out",
    "token": _OF_HUB,
    "cache_dir": _OF_HUB,
    "local_files_only": _OF_HUB,
    "initial_peers": "say bootstrap",
    "active_adapter": "load your own by peft, or ask for a served one in the library",
}

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint


@asynccontextmanager
async def open_swarm(
    path: Any,
    revision: str | None,
    bootstrap: Sequence[Any],
    options: Mapping[str, Any],
    on_checkpoint: Callable[[Checkpoint], None],
) -> AsyncIterator[ServedBlocks]:
    """A client peer for one model. `options` are `open_peer`'s; `on_checkpoint` builds the head, in a worker thread."""
    async with (
        open_peer(bootstrap=bootstrap, **options) as peer,
        peer.blocks(path, on_checkpoint, revision=revision) as blocks,
    ):
        yield blocks


@asynccontextmanager
async def open_daemon(
    path: Any,
    revision: str | None,
    socket_path: Path,
    options: Mapping[str, Any],
    on_checkpoint: Callable[[Checkpoint], None],
) -> AsyncIterator[DaemonBlocks]:
    """One model through the daemon whose socket is `socket_path`. `options`: `hub`, or nothing."""
    async with AsyncExitStack() as stack:
        async with Checkpoints(options.get("hub") or HubSettings()).open(path, revision) as checkpoint:
            await fetch_head(checkpoint)
            # Connect before reading the head, which takes longer than noticing that no daemon runs.
            blocks = await stack.enter_async_context(open_daemon_blocks(socket_path, facts_of(checkpoint)))
            await trio.to_thread.run_sync(on_checkpoint, checkpoint)
        yield blocks


def check_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError for unknown options: many programs pass options of local models."""
    known = set(inspect.signature(open_peer).parameters) - _OF_SERVERS
    for name in options:
        if name in known:
            continue
        if name in _INSTEAD:
            raise TypeError(f"{name}: no option of a remote model: {_INSTEAD[name]}")
        raise TypeError(
            f"{name}: no option of a remote model; leave it out. `device` and `dtype` say where its head lies and"
            f" what it computes in; others are {', '.join(sorted(known))}"
        )


def socket_of(daemon: Literal[True] | str | Path, bootstrap: Sequence[Any], options: Mapping[str, Any]) -> Path:
    """The path of a daemon's socket. Raises ValueError for options that only the daemon can have."""
    others = sorted({name for name in options if name != "hub"} | ({"bootstrap"} if bootstrap else set()))
    if others:
        raise ValueError(f"{', '.join(others)}: with daemon= the daemon knows the swarm; give it these options instead")
    return default_socket_path() if isinstance(daemon, bool) else Path(daemon)
