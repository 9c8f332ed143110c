"""`make bench-curves`: compares losses through a swarm of two servers with local training, 50 steps each, fp32.

The methods are shallow and deep prompts, LoRA in a loop, and LoRA by Trainer. The last column shows the effect of
rounding alone: two local runs from starts that differ by one unit in the last place. If that difference is larger than
the swarm's, the optimizer amplifies rounding, and no two machines would agree.
"""

from __future__ import annotations

import argparse
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import trio
from rich.console import Console
from rich.table import Table

import peerd
from benchmarks.training.curves import METHODS, Curve, Training, small_llama
from peerd.cli.demo import even_spans
from peerd.cli.processes import open_peer_processes
from peerd.compute.checkpoint.demo_model import demo_model_path

SERVERS = 2


def main() -> None:
    """Run all methods, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--positions", type=int, default=48)
    parser.add_argument(
        "--model", choices=("llama", "smollm2"), default="llama", help="a small random Llama, or SmolLM2"
    )
    parser.add_argument("--only", choices=METHODS, action="append", help="one of the methods; may be repeated")
    arguments = parser.parse_args()
    console = Console()
    with TemporaryDirectory() as folder:
        path = small_llama(Path(folder)) if arguments.model == "llama" else demo_model_path()
        found = trio.run(measure, path, arguments, console)
    show(found, arguments, console)


async def measure(path: Path, arguments: Any, console: Console) -> dict[str, Curve]:
    """The curves of the requested methods, through servers in processes of their own."""
    whole = open_local(path)
    blocks, vocabulary = whole.config.num_hidden_layers, whole.config.vocab_size
    ids = torch.randint(
        0, vocabulary, (arguments.rows, arguments.positions), generator=torch.Generator().manual_seed(0)
    )
    training = Training(ids, arguments.steps, arguments.rate)
    found = {}
    async with AsyncExitStack() as stack:
        processes = await stack.enter_async_context(open_peer_processes(threads=1))
        bootstrap = await processes.start()
        join = ("--bootstrap", str(bootstrap.address), "--dtype", "float32", "--kv-tokens", "1024")
        for span in even_spans(blocks, SERVERS):
            await processes.start("--serve-blocks", str(span), "--model", str(path), *join)
        open_remote = partial(
            peerd.RemoteModelForCausalLM.from_pretrained, path, bootstrap=str(bootstrap.address), dtype="float32"
        )
        for name in arguments.only or METHODS:
            console.log(name)
            run = partial(METHODS[name], open_remote, partial(open_local, path), training)
            curve = found[name] = await trio.to_thread.run_sync(run)
            # A long run may end early.
            console.log(f"{name}: {curve.apart:.1e} from local, {curve.rounding:.1e} by rounding")
    return found


def open_local(path: Path) -> Any:
    """The whole model in fp32."""
    from transformers import AutoModelForCausalLM

    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    # Once it is read, a GGUF file's model is plain float32, but Trainer still takes it for a quantized one.
    model.is_quantized = False
    return model


def show(found: dict[str, Curve], arguments: Any, console: Console) -> None:
    """Print a table of first and last losses and of the largest differences."""
    table = Table("", "first loss", "last loss", "swarm to local", "local to local + 1 ulp")
    table.title = (
        f"{arguments.model}, {arguments.steps} steps of AdamW at {arguments.rate:g},"
        f" {arguments.rows} rows of {arguments.positions}, {SERVERS} servers"
    )
    for name, curve in found.items():
        numbers = (f"{curve.local[0]:.4f}", f"{curve.local[-1]:.4f}", f"{curve.apart:.1e}", f"{curve.rounding:.1e}")
        table.add_row(name, *numbers)
    console.print(table)


if __name__ == "__main__":
    main()
