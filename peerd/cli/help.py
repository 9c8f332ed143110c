"""The daemon's help: one screen for `peerd` alone, and its many options under headings by role in `peerd --help`."""

from __future__ import annotations

import click

#: Under which heading each option stands. `Options` is for what none names.
HEADINGS = {
    "Serve blocks for others": (
        "serve_blocks",
        "models",
        "among",
        "revision",
        "disk_bytes",
        "devices",
        "memory_bytes",
        "kv_tokens",
        "dtype",
        "quantize",
        "engine",
        "adapters",
        "any_base",
        "client_adapter_bytes",
        "stay",
        "look_every_s",
        "throughput",
        "uplink",
        "serve_head",
        "idle_only",
        "nice",
        "gpu_share",
        "trainable",
        "trainable_rate",
        "trainable_steps",
    ),
    "Offer a local API": (
        "client",
        "socket_path",
        "http",
        "token_file",
        "no_token",
        "names",
        "origins",
        "keep_positions",
        "drafts",
        "draft_device",
        "remote_head",
        "traces",
        "open_page",
    ),
    "Join a swarm": ("bootstrap", "swarm_key", "identity", "no_mdns"),
    "Choose whose blocks to use": ("allowed", "blocked", "trusted", "manifests", "audit", "audit_limits"),
    "Be reached by others": ("listen", "announce", "no_relay", "no_punch"),
    "Relay for peers behind NATs": (
        "relay",
        "slots",
        "circuits",
        "bytes_a_second",
        "total_bytes_a_second",
        "circuit_hours",
    ),
}
REST = "Options"

SHORT_HELP = """\
peerd runs language models that are bigger than any machine you own, on a swarm.

See it work, on this machine alone:
  peerd demo

Join a swarm, at ADDRESS, which any of its peers printed when it started:
  peerd generate MODEL --prompt "Hello" --bootstrap ADDRESS    ask it once
  peerd chat MODEL --bootstrap ADDRESS                         chat here
  peerd --client --model MODEL --bootstrap ADDRESS --open      in a browser
  peerd --serve-blocks auto --model MODEL --bootstrap ADDRESS  lend it a machine
  peerd join LINK                                              by an invitation

Start a swarm of your own:
  peerd --serve-blocks auto --model MODEL                      print its ADDRESS

MODEL is org/name on the hub (a GGUF file there is org/name:Q4_K_M), a model's
directory, or a .gguf file.

  peerd status             what the daemon on this machine does
  peerd doctor             what is wrong on this machine, and how to mend it
  peerd config init        a file for options that you always give
  peerd --help             all options of a daemon, and all commands
  peerd COMMAND --help     the options of one command
"""


def write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write a command's options, those of a daemon under their headings."""
    heading_of = {name: heading for heading, names in HEADINGS.items() for name in names}
    sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in (*HEADINGS, REST)}
    order = [name for names in HEADINGS.values() for name in names]
    ranked = sorted(command.get_params(ctx), key=lambda param: order.index(param.name) if param.name in order else -1)
    for param in ranked:
        # The usage names the arguments.
        if isinstance(param, click.Option) and (record := param.get_help_record(ctx)) is not None:
            sections[heading_of.get(param.name or "", REST)].append(record)
    for heading, records in sections.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)
