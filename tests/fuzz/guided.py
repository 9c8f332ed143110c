"""Feeds decoders with input that coverage guides: `python -m tests.fuzz.guided --all --runs 60000`.

It needs atheris, which has wheels for Linux alone, and only then finds inputs that reach branches which mutations of
the specification's vectors do not reach. `make fuzz` runs it where atheris can be installed. A process takes one
decoder, because libFuzzer ends its process; an input that breaks the decoder's rules is left in a file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["peerd"]):
    from tests.fuzz.decoders import SLOWEST_S, Decoder, Found, decoders

# Longer input shows no more of a decoder, and takes longer.
MAX_BYTES = 4096


def guided(decoder: Decoder, runs: int, seed: int, corpus: Path) -> None:
    """Feed a decoder so often, beginning with its seeds. Ends the process, with 0 unless an input breaks a rule."""
    for number, data in enumerate(decoder.seeds):
        (corpus / f"{number}").write_bytes(data)

    def one(data: bytes) -> None:
        began = time.thread_time()
        with suppress(*decoder.errors):
            decoder.decode(data)
        if (took_s := time.thread_time() - began) > SLOWEST_S:
            raise Found(f"{decoder.name} took {took_s:.2f} s")

    options = [f"-runs={runs}", f"-seed={seed}", f"-max_len={MAX_BYTES}", "-verbosity=0", "-print_final_stats=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    by_name = {decoder.name: decoder for decoder in decoders()}
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("decoder", nargs="?", choices=sorted(by_name))
    what.add_argument("--all", action="store_true", help="each decoder, in a process of its own")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.all:
        for name in by_name:
            print(name, flush=True)
            amount = ["--runs", str(options.runs), "--seed", str(options.seed)]
            subprocess.run([sys.executable, "-m", "tests.fuzz.guided", name, *amount], check=True)
        return
    with tempfile.TemporaryDirectory() as corpus:
        guided(by_name[options.decoder], options.runs, options.seed, Path(corpus))


if __name__ == "__main__":
    main()
