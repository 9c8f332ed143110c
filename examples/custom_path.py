"""Custom paths through a swarm's blocks: leave some out, repeat some, swap two, and see what this does to a text.

    python examples/custom_path.py

A slice of the decoder's blocks is a module: it takes and returns hidden states, on the servers that have its blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from demo_swarm import demo_swarm, load_tokenizer

import peerd

TEXT = "The sun rises in the east and sets in the west. Water freezes at zero degrees and boils at a hundred."
#: Each path as the spans that it goes through, one after another.
PATHS: dict[str, list[tuple[int, int]]] = {
    "all blocks": [(0, 30)],
    "without 20:22": [(0, 20), (22, 30)],
    "14:16 twice": [(0, 16), (14, 30)],
    "14 and 15 swapped": [(0, 14), (15, 16), (14, 15), (16, 30)],
    "without 2:10": [(0, 2), (10, 30)],
}


def logits_along(model: Any, ids: torch.Tensor, path: Sequence[tuple[int, int]]) -> torch.Tensor:
    """`[1, tokens, vocabulary]` after going through the spans of `path`."""
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    for start, end in path:
        hidden = decoder.layers[start:end](hidden)
    return model.lm_head(decoder.norm(hidden))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bootstrap", help="the address of a peer of a swarm; without one, a swarm is started here")
    options = parser.parse_args(arguments)
    with (
        demo_swarm(options.bootstrap) as (path, address),
        peerd.RemoteModelForCausalLM.from_pretrained(path, bootstrap=address) as model,
        torch.no_grad(),
    ):
        ids = load_tokenizer(path)(TEXT, return_tensors="pt")["input_ids"]
        for name, spans in PATHS.items():
            logits = logits_along(model, ids, spans)
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
            print(f"{name:18} perplexity {loss.exp().item():8.2f}")


if __name__ == "__main__":
    main()
