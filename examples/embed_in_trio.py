"""A Trio program with a swarm inside: two servers and a client in one process, on loopback.

    python examples/embed_in_trio.py "Name three colours."

A real swarm differs in one thing only: the servers run elsewhere, and `bootstrap` is an address that one of
them printed.
"""

from __future__ import annotations

import sys
from contextlib import aclosing

import trio

import peerd
from peerd.compute.checkpoint.demo_model import demo_model_path

LISTEN = "/ip4/127.0.0.1/tcp/0/ws"


async def ask(model: peerd.SwarmModel, question: str) -> None:
    """Print the answer as it comes. Leaving the loop early would end the session on all peers."""
    generation = model.generate(question, chat=True, max_new_tokens=48, temperature=0)
    async with aclosing(generation.tokens()) as tokens:
        async for token in tokens:
            print(token.text, end="", flush=True)
    print()
    for hop in generation.chain:
        print(f"blocks {hop.span} on {hop.peer}")


async def main(question: str) -> None:
    path = demo_model_path()
    first, second = peerd.Span(0, 15), peerd.Span(15, 30)
    async with (
        peerd.open_peer(listen=[LISTEN], serve=[peerd.ServeSpec(path, first)]) as one,
        peerd.open_peer(listen=[LISTEN], serve=[peerd.ServeSpec(path, second)], bootstrap=one.addresses),
        peerd.open_peer(bootstrap=one.addresses) as client,
        client.model(path) as model,
    ):
        try:
            await ask(model, question)
        except peerd.NoChain as error:
            sys.exit(f"nobody serves some blocks: {error}")


if __name__ == "__main__":
    trio.run(main, " ".join(sys.argv[1:]) or "Name three colours.")
