"""`peerd generate`: one answer from a swarm, streamed to standard output or reported as JSON."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from peerd.api.coverage import coverage_of, missing_of, needs, offers_of, usable
from peerd.cli.console import say, screen, short, working, write
from peerd.cli.options.shared import Drafting, JoinOptions
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.peer import open_peer
from peerd.protocol.errors import InvalidRequest, NoChain

if TYPE_CHECKING:
    from peerd.client.finding.served_by import ServedBy
    from peerd.client.generation import Generation
    from peerd.client.model import SwarmModel
    from peerd.compute.adapters.lora import LoraAdapter
    from peerd.peer import Peer

# How often to look for servers of blocks that have none.
LOOK_S = 2.0


@dataclass(frozen=True, slots=True)
class Request:
    """A request to a model. `sampling` are arguments of `SamplingParams.from_config`; `adapter` and `speculate` are
    what `SwarmModel.generate` takes. `draft` is the small model that guesses tokens, if one does. `waits`: whether to
    wait for servers where blocks have none. `any_base`: `adapter` is the client's own, of whatever model.
    `remote_head` is what `Peer.model` takes.
    """

    prompt: str
    chat: bool
    sampling: Mapping[str, float | int | None]
    adapter: str | Path | None = None
    speculate: bool = True
    draft: Drafting | None = None
    waits: bool = False
    any_base: bool = False
    remote_head: bool = False


async def generate(
    model_path: Path | str,
    joining: JoinOptions,
    request: Request,
    *,
    as_json: bool,
    disk_bytes: int | None = None,
) -> None:
    """Join a swarm as a client for one answer. Raises PeerdError, CheckpointError."""
    async with AsyncExitStack() as stack:
        with working("joining the swarm") as display:
            hub = HubSettings(disk_bytes, watch=display.transferred)
            opening = open_peer(
                bootstrap=joining.bootstrap,
                swarm_key=joining.swarm_key,
                rules=joining.rules,
                may_be_relayed=joining.may_be_relayed,
                may_punch=joining.may_punch,
                hub=hub,
            )
            peer = await stack.enter_async_context(opening)
            display.update(f"reading the head of {Path(model_path).name}")
            model = await stack.enter_async_context(peer.model(model_path, remote_head=request.remote_head))
            if (draft := request.draft) is not None:
                display.update(f"reading {Path(draft.model).name}, which drafts")
                await stack.enter_async_context(peer.drafting(model, draft.model, device=draft.device))
        served = partial(until_served, peer, model) if request.waits else None
        generation = await answer(model, request, quiet=as_json, until_served=served)
    if as_json:
        write(report(generation) + "\n")
    else:
        say(figures(generation))


async def answer(
    model: SwarmModel,
    request: Request,
    *,
    quiet: bool,
    until_served: Callable[[], Awaitable[None]] | None = None,
) -> Generation:
    """Generate an answer, and stream its text to standard output unless `quiet`.

    until_served: waits for servers of all blocks. With it, what they cannot begin is begun again. Raises PeerdError,
    AdapterError.
    """
    adapter: str | Path | LoraAdapter | None = request.adapter
    if request.adapter is not None and request.any_base:
        adapter = await model.read_adapter(request.adapter, any_base=True)
    while True:
        if until_served is not None:
            await until_served()
        try:
            generation = model.generate(
                request.prompt,
                chat=request.chat,
                adapter=adapter,
                speculate=request.speculate,
                **request.sampling,
            )
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        try:
            await _stream(generation, quiet=quiet)
            return generation
        except NoChain:
            # Peers may announce blocks and not be reached. Once text is out, the answer cannot begin again.
            if until_served is None or generation.token_ids:
                raise
        await trio.sleep(LOOK_S)


async def _stream(generation: Generation, *, quiet: bool) -> None:
    async with aclosing(generation.tokens()) as tokens:
        with working("waiting for the first token"):
            token = await anext(tokens)
        if quiet:
            with working("generating"):
                async for _ in tokens:
                    pass
            return
        try:
            write(token.text)
            async for token in tokens:
                write(token.text)
        finally:
            # The next text on the terminal, also an error, begins on a line of its own.
            write("\n")


async def until_served(peer: Peer, model: SwarmModel) -> None:
    """Wait until every block of the model has a server, and say meanwhile which blocks have none."""
    reported = ""
    with working("looking for servers") as display:
        while True:
            offers = usable(await offers_of(peer, model, LOOK_S), model)
            missing = missing_of(coverage_of(model, offers))
            if not missing:
                return
            lacks = f"{model.facts.name} {needs(missing)}"
            display.update(f"{lacks}; waiting for servers")
            if lacks != reported and not screen().is_terminal:
                say(f"{lacks}; waiting for servers")
            reported = lacks
            await trio.sleep(LOOK_S)


def report(generation: Generation) -> str:
    """The answer and its figures as one JSON object."""
    return json.dumps(
        {
            "text": generation.text,
            "token_ids": generation.token_ids,
            "prompt_tokens": len(generation.prompt),
            "tokens_per_second": generation.tokens_per_second,
            "time_to_first_token_s": generation.time_to_first_token_s,
            "chain": [_served_by(hop) for hop in generation.chain],
            "failovers": generation.failovers,
            "drafted": generation.drafted,
            "accepted": generation.accepted,
        },
        ensure_ascii=False,
    )


def _served_by(hop: ServedBy) -> dict[str, object]:
    return {"peer": hop.peer, "start": hop.span.start, "end": hop.span.end}


def figures(generation: Generation) -> str:
    """The figures of an answer as a line for people."""
    parts = [f"{len(generation.token_ids)} tokens"]
    if generation.tokens_per_second is not None:
        parts.append(f"{generation.tokens_per_second:.1f} tokens/s")
    if generation.time_to_first_token_s is not None:
        parts.append(f"first after {generation.time_to_first_token_s:.2f} s")
    if generation.drafted:
        parts.append(f"{generation.accepted} of {generation.drafted} guesses right")
    if generation.failovers:
        parts.append(f"{generation.failovers} failover{'s' if generation.failovers > 1 else ''}")
    chain = " -> ".join(f"{short(hop.peer)} {hop.span}" for hop in generation.chain)
    return f"{', '.join(parts)} (chain: {chain})"
