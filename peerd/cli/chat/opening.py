"""Opens what answers a chat: the daemon on this machine, or else a peer of its own behind the same local API."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import platformdirs

from peerd.cli.chat.api_client import ApiClient
from peerd.cli.chat.chat import Chat, model_names
from peerd.cli.chat.conversation import Conversation
from peerd.cli.chat.input import Editor, Lines, keeping_terminal
from peerd.cli.console import say, working
from peerd.cli.options.parsing import at_revision, parse_model
from peerd.cli.options.shared import JoinOptions
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.local.socket_path import default_socket_path
from peerd.peer import open_peer
from peerd.protocol.errors import InvalidRequest, Unresponsive
from peerd.trio_tools import import_in_thread

_HISTORY = "chat_history"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user wants to talk to. `model`: a name of the daemon's, or what `--model` takes; None: any.

    wants_own: never use the daemon, because the user named a swarm.
    """

    model: str | None
    revision: str | None
    joining: JoinOptions
    socket_path: Path | None = None
    disk_bytes: int | None = None
    wants_own: bool = False
    system: str = ""
    keeps_history: bool = True


async def run_chat(asked: Asked) -> None:
    """Chat until the user leaves. Raises PeerdError, CheckpointError, and Interrupted if a signal ended it."""
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with keeping_terminal():
        async with _open(asked) as (client, model):
            history = platformdirs.user_state_path("peerd") / _HISTORY if asked.keeps_history else None
            source = Editor(history) if is_interactive else Lines()
            if is_interactive:
                say(f"{model} listens; /help lists commands, Ctrl-D leaves")
            conversation = Conversation(model, asked.system)
            await Chat(client, conversation, source, is_interactive=is_interactive).run()


@asynccontextmanager
async def _open(asked: Asked) -> AsyncIterator[tuple[ApiClient, str]]:
    """What answers, and the name of the model there."""
    path = asked.socket_path or default_socket_path()
    names = [] if asked.wants_own else await _names_at(path)
    if names and asked.model in (None, *names):
        yield ApiClient(path), asked.model or names[0]
        return
    if asked.model is None:
        raise InvalidRequest(
            f"no daemon with a model listens on {path}: start one with peerd --client --model MODEL, or say"
            " peerd chat MODEL --bootstrap ADDRESS"
        )
    if not asked.joining.bootstrap:
        there = f"the daemon has {', '.join(names)}, and" if names else f"no daemon with a model listens on {path}, and"
        raise InvalidRequest(
            f"{there} --bootstrap is missing for a peer of its own: give an address that a peer of the swarm printed,"
            " or set PEERD_BOOTSTRAP"
        )
    async with _open_own(asked, _own_model(asked.model, asked.revision)) as found:
        yield found


async def _names_at(path: Path) -> list[str]:
    """The models of the daemon at a socket; none if none listens."""
    try:
        return await model_names(ApiClient(path))
    except Unresponsive:
        return []


def _own_model(model: str, revision: str | None) -> Path | str:
    try:
        return at_revision(parse_model(model), revision)
    except click.UsageError as error:
        raise InvalidRequest(error.message) from None


@asynccontextmanager
async def _open_own(asked: Asked, path: Path | str) -> AsyncIterator[tuple[ApiClient, str]]:
    """A peer of our own with a local API that only we can reach."""
    await import_in_thread("peerd.api.serve")
    from peerd.api.serve import Endpoint, open_local_api

    joining = asked.joining
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="peerd-chat-"))
        socket_path = Path(folder) / "peerd.sock"
        with working("joining the swarm") as display:
            opening = open_peer(
                bootstrap=joining.bootstrap,
                swarm_key=joining.swarm_key,
                rules=joining.rules,
                may_be_relayed=joining.may_be_relayed,
                may_punch=joining.may_punch,
                hub=HubSettings(asked.disk_bytes, watch=display.transferred),
            )
            peer = await stack.enter_async_context(opening)
            display.update(f"reading the head of {Path(path).name}")
            model = await stack.enter_async_context(peer.model(path))
            name = model.facts.name
            await stack.enter_async_context(open_local_api(peer, {name: model}, Endpoint(socket_path)))
        yield ApiClient(socket_path), name
