"""A client holds only the head: its memory shows it."""

from __future__ import annotations

import json
import sys

import pytest
import trio

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.capacity import block_bytes

pytestmark = [pytest.mark.real_time, pytest.mark.model, pytest.mark.processes]

ROOM_MIB = 300

# A client in a process of its own. What imports take is not ours to answer for, so it is measured first.
CLIENT = """
import json, sys
import torch, transformers, trio
import peerd.peer, peerd.client.model, peerd.client.generation, peerd.client.finding.finder
import peerd.exchange.head_task, peerd.client.session.opener
import peerd.compute.checkpoint.checkpoint, peerd.compute.model.head, peerd.compute.checkpoint.tokenizer


def mib(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


async def main(path, *bootstrap):
    imports = mib("VmRSS")
    async with peerd.peer.open_peer(bootstrap=bootstrap) as peer, peer.model(path) as model:
        generation = model.generate("Once upon a time", temperature=0, max_new_tokens=8)
        async for _ in generation:
            pass
        figures = {"imports": imports, "held": mib("VmRSS"), "peak": mib("VmHWM"), "token_ids": generation.token_ids}
    print(json.dumps(figures))


trio.run(main, *sys.argv[1:])
"""


async def test_a_client_never_takes_more_memory_than_the_head_and_a_little(open_local_swarm, model_path):
    with open_checkpoint(model_path) as checkpoint:
        config = checkpoint.config
        head_mib = config.vocab_size * config.hidden_size * checkpoint.dtype.itemsize / 2**20
        blocks_mib = block_bytes(checkpoint, checkpoint.dtype) * checkpoint.block_count / 2**20
    assert blocks_mib > ROOM_MIB, "a client that held the blocks as well could not be told"
    async with open_local_swarm(1) as swarm:
        command = [sys.executable, "-c", CLIENT, str(model_path), *map(str, swarm.bootstrap)]
        done = await trio.run_process(command, capture_stdout=True)
    figures = json.loads(done.stdout)
    assert len(figures["token_ids"]) == 8
    print(f"head {head_mib:.0f} MiB; over the imports: held {figures['held'] - figures['imports']:.0f} MiB,", end=" ")
    print(f"at most {figures['peak'] - figures['imports']:.0f} MiB")
    assert figures["peak"] - figures["imports"] < head_mib + ROOM_MIB
