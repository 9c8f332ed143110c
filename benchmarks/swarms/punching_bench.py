"""`make bench-punching`: measures decoding through a relay and over a punched connection, between two private networks.

Real processes run in network namespaces behind real NATs: a relay, a server of the whole demonstration model in one
private network, and a client in the other. Packets to and from the relay take 40 ms longer, and those to and from each
NAT 5 ms. So a round trip between the two takes 180 ms through the relay, and 20 ms directly. Both ways take turns, and
must give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio
from rich.console import Console

from peerd.cli.processes import open_peer_processes
from peerd.compute.checkpoint.demo_model import demo_model_path
from tests.fakes.netlab import missing, open_lab

CLIENT = Path(__file__).with_name("punching_client.py")
LISTEN = "/ip4/0.0.0.0/tcp/31330/ws"
SLOWED_MS = {"relay1": 40.0, "nat_a": 5.0, "nat_b": 5.0}
SERVING = ("--serve-blocks", "0:30", "--kv-tokens", "1024", "--throughput", "1000", "--quantize", "none")
WAYS = ("relayed", "punched")
SETUP_S = 120.0


async def measure(tokens: int, rounds: int, console: Console) -> dict[str, list[dict[str, Any]]]:
    """What the client printed in each round, by the way to the server."""
    model = str(demo_model_path())
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    async with AsyncExitStack() as stack:
        lab = await stack.enter_async_context(open_lab())
        for host, delay_ms in SLOWED_MS.items():
            await stack.enter_async_context(lab.slowed(host, delay_ms))
        processes = await stack.enter_async_context(open_peer_processes(threads=1))
        relay = await processes.start("--relay", listen=LISTEN, under=lab.under("relay1"))
        joining = ("--bootstrap", str(relay.address))
        server = await processes.start(*SERVING, "--model", model, *joining, listen=LISTEN, under=lab.under("b"))
        with trio.fail_after(SETUP_S):
            while f"the relay {relay.peer_id} reaches us" not in server.log.read_text():
                await trio.sleep(0.1)
        for _ in range(rounds):
            for way in WAYS:
                command = [*lab.under("a"), sys.executable, str(CLIENT), model, str(tokens), way, str(relay.address)]
                done = await trio.run_process(command, capture_stdout=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                found[way].append(json.loads(done.stdout))
                console.log({name: value for name, value in found[way][-1].items() if name != "ids"})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    if why := missing():
        sys.exit(why)
    found = trio.run(measure, chosen.tokens, chosen.rounds, Console(stderr=True))
    turns = [turn for way in WAYS for turn in found[way]]
    if any(turn["way"] != way for way in WAYS for turn in found[way]):
        sys.exit("a client did not reach the server in the way that was measured")
    if any(turn["ids"] != turns[0]["ids"] for turn in turns):
        sys.exit("the tokens differ")
    console = Console()
    for way in WAYS:
        rate = statistics.median(turn["tokens_a_second"] for turn in found[way])
        rtt_ms = statistics.median(turn["rtt_ms"] for turn in found[way])
        console.print(f"{way}: round trip {rtt_ms:.0f} ms, {rate:.2f} tokens/s")


if __name__ == "__main__":
    main()
