"""Measures what a client's head takes in memory, with the vocabulary's matrix and without (`--remote-head`).

    python -m benchmarks.compute.client_head_bench MODEL

Each is loaded in a process of its own. Beside it: the bytes that a client receives for a token, of the values alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from pathlib import Path

import torch

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.model.head import Head, load_head_model, load_input_side

MIB = 2**20


def resident_bytes() -> int:
    """The resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def bytes_taken(path: Path, is_remote: bool) -> int:
    """How much this process grows by a client's head that has embedded a hundred tokens."""
    with open_checkpoint(path) as checkpoint:
        before = resident_bytes()
        model = load_input_side(checkpoint) if is_remote else load_head_model(checkpoint)
        head = Head(model.model, checkpoint.family)
        if not is_remote:
            head.make_shortlist()
        head.embed(torch.arange(100))
        return resident_bytes() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    path = parser.parse_args().model
    with open_checkpoint(path) as checkpoint:
        hidden_bytes = checkpoint.hidden_size * checkpoint.dtype.itemsize
    print("| tokens are drawn | head of the client, MiB | received for a token, bytes |\n|---|---|---|")
    for where, is_remote, received in (("by the client", False, hidden_bytes), ("by the last server", True, 4)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            taken = pool.apply(bytes_taken, (path, is_remote))
        print(f"| {where} | {taken / MIB:.1f} | {received} |")


if __name__ == "__main__":
    main()
