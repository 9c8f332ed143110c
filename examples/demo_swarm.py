"""A swarm on this machine for the examples: a bootstrap peer and two servers of SmolLM2-135M-Instruct.

A real swarm differs in one thing only: its servers run elsewhere, and you need the address of one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from peerd.compute.checkpoint.demo_model import demo_model_path


@contextmanager
def demo_swarm(address: str | None = None) -> Iterator[tuple[Path, str]]:
    """The model's file, and the address of a peer of a swarm that serves it: `address`, or one started here."""
    model = demo_model_path()
    if address is not None:
        yield model, address
        return
    with TemporaryDirectory(prefix="peerd-") as folder:
        started: list[subprocess.Popen[str]] = []
        try:
            address = address_of(start_peer(started, Path(folder)))
            for span in ("0:15", "15:30"):
                start_peer(started, Path(folder), "--serve-blocks", span, "--model", model, "--bootstrap", address)
            for server in started[1:]:
                address_of(server)
            yield model, address
        finally:
            for process in started:
                process.kill()
                process.communicate()


def start_peer(started: list[subprocess.Popen[str]], folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Run `peerd ARGUMENTS` in a process of its own, which ends when this process does."""
    name = folder / f"peer-{len(started)}"
    command = [sys.executable, "-m", "peerd", "--stop-on-eof", "--listen", "/ip4/127.0.0.1/tcp/0/ws"]
    # Two servers compute on this machine, so each gets a part of its cores.
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    with name.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--identity", name.with_suffix(".key"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    started.append(process)
    return process


def address_of(process: subprocess.Popen[str]) -> str:
    """Return the address that a peer prints when it serves."""
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    if not address:
        raise RuntimeError(f"a peer ended before it served: {process.args}")
    return address


def load_tokenizer(model: Path) -> Any:
    """Read the tokenizer from a GGUF file; it pads on the right, as training needs it."""
    tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name, local_files_only=True)
    tokenizer.padding_side = "right"
    return tokenizer
