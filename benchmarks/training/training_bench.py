"""`make bench-training`: compares forward and forward + backward through 1 and 2 servers with local Transformers.

A pass has eight rows of 128 positions and a deep prompt in every block, and asks for the gradients of the input and the
prompts. There are two models: SmolLM2-135M (30 blocks of 576) and a random Llama of 16 blocks of 1024. Each process has
one compute thread, so two servers may be faster than the local model. Figures are medians of rounds in which all take
turns, so compare within a table.
Then what a Transformers program pays: what the facade adds to the async library, and a token's bytes on the wire.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import trio
from rich.console import Console
from rich.table import Table

from benchmarks.training.counting import CountingTransport
from benchmarks.training.facade_rows import measure_facade
from peerd.cli.demo import even_spans
from peerd.cli.processes import PeerProcesses, open_peer_processes
from peerd.client.model import SwarmModel
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.peer import open_peer

ROWS, POSITIONS, PROMPT_POSITIONS = 8, 128, 16
SERVERS = (1, 2)
FORWARD, BOTH = "forward", "forward + backward"


def random_llama(folder: Path) -> Path:
    """16 blocks of 1024, as in the measurements of Petals."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        num_hidden_layers=16,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=1024,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


class Local:
    """Transformers' own decoder, frozen, with the same prompts attached."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        where = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
        self.decoder = model.eval().requires_grad_(False).model
        self.prompts: torch.Tensor | None = None
        for block, layer in enumerate(self.decoder.layers):
            layer.register_forward_pre_hook(self._adding(block))

    def _adding(self, block: int) -> Any:
        def add(_: Any, args: tuple[torch.Tensor, ...]) -> Any:
            assert self.prompts is not None
            hidden = args[0]
            first = hidden[:, :PROMPT_POSITIONS] + self.prompts[block]
            return (torch.cat((first, hidden[:, PROMPT_POSITIONS:]), 1), *args[1:])

        return add

    async def forward(self, hidden: torch.Tensor, prompts: torch.Tensor) -> None:
        self.prompts = prompts
        with torch.inference_mode():
            self.decoder(inputs_embeds=hidden, use_cache=False)

    async def both(self, hidden: torch.Tensor, prompts: torch.Tensor) -> None:
        leaves = hidden.clone().requires_grad_(), prompts.clone().requires_grad_()
        self.prompts = leaves[1]
        self.decoder(inputs_embeds=leaves[0], use_cache=False).last_hidden_state.sum().backward()


class Remote:
    """The same pass through a swarm."""

    def __init__(self, model: SwarmModel, transport: CountingTransport) -> None:
        self.model = model
        self.transport = transport

    async def forward(self, hidden: torch.Tensor, prompts: torch.Tensor) -> None:
        await self.model.forward(hidden, prompts=prompts, keep=False)

    async def both(self, hidden: torch.Tensor, prompts: torch.Tensor) -> None:
        pass_ = await self.model.forward(hidden, prompts=prompts)
        await pass_.backward(torch.ones_like(pass_.output))


async def seconds(run: Callable[[torch.Tensor, torch.Tensor], Awaitable[None]], *inputs: torch.Tensor) -> float:
    began = time.perf_counter()
    await run(*inputs)
    return time.perf_counter() - began


async def open_remote(stack: AsyncExitStack, processes: PeerProcesses, path: Path, blocks: int, servers: int) -> Remote:
    """Start a swarm for each number of servers."""
    bootstrap = await processes.start()
    join = ("--bootstrap", str(bootstrap.address), "--dtype", "float32", "--kv-tokens", "1024")
    for span in even_spans(blocks, servers):
        await processes.start("--serve-blocks", str(span), "--model", str(path), *join)
    transport = CountingTransport()
    peer = await stack.enter_async_context(open_peer(bootstrap=[bootstrap.address], transport=transport))
    return Remote(await stack.enter_async_context(peer.model(path)), transport)


async def measure(name: str, path: Path, rounds: int, console: Console) -> None:
    local = Local(path)
    config = local.decoder.config
    blocks, width = config.num_hidden_layers, config.hidden_size
    generator = torch.Generator().manual_seed(0)
    hidden = 0.1 * torch.randn(ROWS, POSITIONS, width, generator=generator)
    prompts = 0.1 * torch.randn(blocks, 1, PROMPT_POSITIONS, width, generator=generator)
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    carried: dict[tuple[str, str], int] = {}
    async with open_peer_processes(threads=1) as processes, AsyncExitStack() as stack:
        columns: dict[str, Local | Remote] = {"local": local}
        for count in SERVERS:
            remote = await open_remote(stack, processes, path, blocks, count)
            columns[f"{count} server{'s' if count > 1 else ''}"] = remote
        for number in range(rounds + 1):
            console.log(f"{name}, round {number} of {rounds}")
            for column, who in columns.items():
                for row, run in ((FORWARD, who.forward), (BOTH, who.both)):
                    before = who.transport.carried if isinstance(who, Remote) else 0
                    took_s = await seconds(run, hidden, prompts)
                    if isinstance(who, Remote):
                        carried[row, column] = (who.transport.carried - before) // (ROWS * POSITIONS)
                    # The first round is warm-up.
                    if number:
                        rates[row, column].append(ROWS * POSITIONS / took_s)
    show(name, rates, carried, list(columns), console)


def show(
    name: str,
    rates: dict[tuple[str, str], list[float]],
    carried: dict[tuple[str, str], int],
    columns: list[str],
    console: Console,
) -> None:
    table = Table("tokens/s", *columns, title=f"{name}, fp32, {ROWS} x {POSITIONS}, one thread a process; medians")
    for row in (FORWARD, BOTH):
        cells = [f"{statistics.median(rates[row, columns[0]]):.0f}"]
        for column in columns[1:]:
            shares = [one / two for one, two in zip(rates[row, column], rates[row, columns[0]], strict=True)]
            cells.append(f"{statistics.median(rates[row, column]):.0f} ({statistics.median(shares):.2f} of local)")
        table.add_row(row, *cells)
    for row in (FORWARD, BOTH):
        table.add_row(f"{row}, client's wire bytes a token", "", *(str(carried[row, name]) for name in columns[1:]))
    console.print(table)


async def run(rounds: int, only_facade: bool, console: Console) -> None:
    with TemporaryDirectory(prefix="peerd-bench-") as folder:
        models = {
            "SmolLM2-135M": (demo_model_path(), 30),
            "random Llama, 16 blocks of 1024": (random_llama(Path(folder)), 16),
        }
        for name, (path, blocks) in models.items():
            if not only_facade:
                await measure(name, path, rounds, console)
            await measure_facade(name, path, blocks, SERVERS, rounds, console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--facade", action="store_true", help="measure only what the facade adds to the async library")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trio.run(run, arguments.rounds, arguments.facade, Console(width=120))


if __name__ == "__main__":
    main()
