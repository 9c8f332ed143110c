"""The options of serving: on which devices blocks run, how they are stored, with which adapters, trained by whom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peerd.cli.console import working
from peerd.cli.options.parsing import parse_adapter, parse_device, parse_limit, parse_memory, parse_peer_id
from peerd.cli.options.rules import DaemonOptions
from peerd.cli.options.shared import DTYPES, ENGINES, QUANTIZATIONS, Command

if TYPE_CHECKING:
    from peerd.spans.spec import ServeSpec, Trainable

_OPTIONS = (
    click.option("--dtype", type=click.Choice(DTYPES), help="The dtype for computing. Default: the checkpoint's."),
    click.option(
        "--device",
        "devices",
        type=parse_device,
        multiple=True,
        metavar="DEVICE",
        help="cpu, cuda (the first GPU), cuda:N, or cuda:all. Repeat it for several: each runs a part of the"
        " blocks, as its memory allows. Default: cpu.",
    ),
    click.option(
        "--kv-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="How many positions' KV to keep, for all sessions together. Default: what fits into"
        " --memory, else into half of what is free; with llamacpp at most 16384.",
    ),
    click.option(
        "--memory",
        "memory_bytes",
        type=parse_memory,
        metavar="SIZE",
        help="The memory for serving, beyond the program itself, on each device, such as 6GiB. Default: what is free.",
    ),
    click.option(
        "--quantize",
        type=click.Choice(QUANTIZATIONS),
        help="How weights are stored: int8 takes half as much as bfloat16, nf4 a little more than a quarter; packed"
        " keeps the weights of files quantized to integers (GGUF, AWQ, GPTQ, compressed-tensors) as they are, on a CPU:"
        " the fastest; none is the most exact. Default: packed where the file allows it and this CPU is faster so,"
        " unless --dtype is given; else none.",
    ),
    click.option(
        "--engine",
        type=click.Choice(ENGINES),
        default="auto",
        help="What computes: torch, or llamacpp, which serves GGUF files of the most common architectures on the CPU as"
        " they are, without adapters and training; pip install 'peerd[llamacpp]' installs it. Default: auto, which is"
        " llamacpp where it is installed and torch would dequantize such a file, or else torch.",
    ),
    click.option(
        "--throughput",
        type=click.FloatRange(min=0, min_open=True),
        metavar="RATE",
        help="Announce this speed, in positions a second through one block, instead of measuring it once.",
    ),
    click.option(
        "--adapter",
        "adapters",
        type=parse_adapter,
        multiple=True,
        metavar="NAME=DIR",
        help="Serve a LoRA adapter too, as peft saved it, for the sessions that ask for NAME: a directory, or org/name"
        " on the hub, whose NAME may be left out. Repeat it for several.",
    ),
    click.option(
        "--any-base",
        is_flag=True,
        help="Serve adapters that were trained for another model too, such as another quantization of this one.",
    ),
    click.option(
        "--client-adapters",
        "client_adapter_bytes",
        type=parse_limit,
        metavar="SIZE",
        help="How large an adapter a client may upload for its own session; 0: none. Default: 64MB, or a 64th"
        " of the memory.",
    ),
    click.option(
        "--uplink",
        type=parse_memory,
        metavar="SIZE",
        help="Announce that this machine can send this much a second, such as 2.5MB for 20 Mbit/s. Clients then prefer"
        " faster lines for long prompts and training. Default: what its connections show.",
    ),
    click.option(
        "--serve-head/--no-serve-head",
        default=None,
        help="Beside the model's last block, draw tokens for clients that ask for it (--remote-head), with the model's"
        " head, which takes memory. Default: in a private swarm, if it takes at most a 16th of the memory.",
    ),
    click.option(
        "--idle-only",
        is_flag=True,
        help="Serve only while nobody else uses this machine: no input for a minute, and other programs take little of"
        " the processor and of the GPUs that serve. Otherwise sessions get a minute to end, and go on elsewhere."
        " Serving begins again after five quiet minutes. With it, --nice is 10 unless it is given.",
    ),
    click.option(
        "--nice",
        type=click.IntRange(0, 19),
        metavar="N",
        help="Let other programs go first on the processor: 0 is as they are, 19 is last.",
    ),
    click.option(
        "--gpu-share",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="SHARE",
        help="Use this share of a GPU's time at most, such as 0.5: after each batch the server pauses.",
    ),
    click.option(
        "--trainable",
        type=parse_peer_id,
        multiple=True,
        metavar="PEERID",
        help="Let this client train a copy of the blocks (peerd train-span). What others are served stays as it is."
        " Repeat it for several.",
    ),
    click.option(
        "--trainable-rate",
        type=click.FloatRange(min=0, min_open=True),
        metavar="RATE",
        help="The greatest learning rate of such clients. Default: 0.001.",
    ),
    click.option(
        "--trainable-steps",
        type=click.IntRange(min=1),
        metavar="N",
        help="How many steps a copy may be away from the published weights. Default: 10000.",
    ),
)


def serving_options(command: Command) -> Command:
    """Add the options of serving to a command; `spec_of` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def spec_of(options: DaemonOptions, model: Path | str, identity_file: Path) -> ServeSpec:
    """What a server with these options serves. identity_file: clients' trained copies are kept beside it."""
    with working("starting"):
        from peerd.spans.devices import check_devices
        from peerd.spans.spec import ServeSpec

        device = check_devices(",".join(options.serving.devices) or "cpu")
    serving = options.serving
    return ServeSpec(
        model,
        None if isinstance(options.serve_blocks, str) else options.serve_blocks,
        among=options.among,
        dtype=serving.dtype,
        device=device,
        kv_tokens=serving.kv_tokens,
        memory_bytes=serving.memory_bytes,
        quantize=serving.quantize,
        engine=serving.engine,
        throughput=serving.throughput,
        adapters=serving.adapters,
        any_base=serving.any_base,
        client_adapter_bytes=serving.client_adapter_bytes,
        stay=serving.stay,
        look_every_s=serving.look_every_s,
        uplink=serving.uplink,
        head=serving.serve_head,
        share=serving.gpu_share or 1.0,
        trainable=_trainable(options, identity_file),
    )


def _trainable(options: DaemonOptions, identity_file: Path) -> Trainable | None:
    serving = options.serving
    if not serving.trainable:
        return None
    from peerd.cli.daemon import state_dir
    from peerd.spans.spec import Trainable

    limits: dict[str, Any] = {"max_rate": serving.trainable_rate, "max_steps": serving.trainable_steps}
    folder = state_dir(identity_file) / "trained"
    return Trainable(
        frozenset(serving.trainable), folder, **{name: each for name, each in limits.items() if each is not None}
    )
