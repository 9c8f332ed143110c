"""A client of `punching_bench.py`, on a host of its own: generates one answer, and prints figures as JSON.

punching_client.py MODEL TOKENS relayed|punched BOOTSTRAP
"""

from __future__ import annotations

import json
import sys
import time

import torch
import trio

from peerd.peer import open_peer

PROMPT = "Once upon a time"
# The first tokens, after the prompt, are not counted.
SETTLING_TOKENS = 2
# How long a punched connection may take to come about.
PUNCH_S = 20.0


async def main(model_path: str = "", tokens: str = "0", way: str = "", *bootstrap: str) -> None:
    async with (
        open_peer(bootstrap=bootstrap, may_punch=way == "punched") as peer,
        peer.model(model_path) as model,
    ):
        # Guesses would hide what one token costs.
        model.speculation = None
        with trio.move_on_after(PUNCH_S):
            while not any(connection.way == way for connection in peer.connections.live.values()):
                await trio.sleep(0.1)
        count = int(tokens) + SETTLING_TOKENS
        generation = model.generate(model.encode(PROMPT), temperature=0, max_new_tokens=count, eos_token_ids=())
        ids, times_s = [], []
        async for token in generation.tokens():
            ids.append(token.id)
            times_s.append(time.monotonic())
        rtts_s = [each.rtt_s for each in peer.connections.live.values() if each.way == way and each.rtt_s is not None]
        rate = (count - SETTLING_TOKENS) / (times_s[-1] - times_s[SETTLING_TOKENS - 1])
        found = {"way": way if rtts_s else "", "rtt_ms": 1000 * min(rtts_s, default=0.0), "tokens_a_second": rate}
        sys.stdout.write(json.dumps(found | {"ids": ids}) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    trio.run(main, *sys.argv[1:])
