"""A linear probe: from which blocks' hidden states can one tell a question from a statement?

    python examples/linear_probe.py

The servers return the hidden states between any two blocks. A ridge regression in this program shows what they contain.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from demo_swarm import demo_swarm, load_tokenizer

import peerd

VERBS = ("bake bread", "sing", "swim well", "know the way", "like winter", "play chess", "speak Dutch", "drive")
WHO = ("they", "your friends", "the two of you", "those people")
#: The texts have no question mark, which would make it too easy.
TEXTS = [text for who in WHO for verb in VERBS for text in (f"do {who} {verb}", f"{who} {verb}")]
LABELS = torch.tensor([1.0, -1.0] * (len(TEXTS) // 2))


def mean_states(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """The hidden states of the last position of each text, at every border between blocks: `[texts, blocks + 1,
    width]`.
    """
    batch = tokenizer(list(texts), return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model.model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    last = batch["attention_mask"].sum(1) - 1
    return torch.stack([state[torch.arange(len(last)), last] for state in states], 1).float()


def probe(states: torch.Tensor, labels: torch.Tensor, trained: torch.Tensor) -> float:
    """How many texts of a test set a ridge regression classifies correctly; `states` `[texts, width]`."""
    states = torch.nn.functional.normalize(states - states[trained].mean(0), dim=-1)
    known = states[trained]
    gram = known @ known.T + 0.1 * torch.eye(len(known))
    weights = known.T @ torch.linalg.solve(gram, labels[trained])
    right = (states @ weights).sign() == labels
    return float(right[~trained].float().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bootstrap", help="the address of a peer of a swarm; without one, a swarm is started here")
    parser.add_argument("--texts", type=int, default=len(TEXTS), help="how many texts to look at")
    options = parser.parse_args(arguments)
    with (
        demo_swarm(options.bootstrap) as (path, address),
        peerd.RemoteModelForCausalLM.from_pretrained(path, bootstrap=address) as model,
    ):
        tokenizer = load_tokenizer(path)
        texts, labels = TEXTS[: options.texts], LABELS[: options.texts]
        states = torch.cat([mean_states(model, tokenizer, texts[at : at + 8]) for at in range(0, len(texts), 8)])
        trained = torch.arange(len(texts)) < len(texts) // 2
        for block in range(states.shape[1]):
            right = probe(states[:, block], labels, trained)
            print(f"before block {block:2}: {right:4.0%} {'#' * round(20 * right)}")


if __name__ == "__main__":
    main()
