"""Prompt tuning: teach a swarm's model to tell good reviews from bad ones, by eight vectors and a small head.

    python examples/prompt_tuning.py

The blocks on the servers do not change. Only the vectors before each text and the head that reads the last position are
trained, in this program.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from demo_swarm import demo_swarm, load_tokenizer

import peerd

GOOD = ("wonderful", "a joy from start to end", "the best I have seen", "warm and funny", "I loved every minute")
BAD = ("dreadful", "a bore from start to end", "the worst I have seen", "cold and dull", "I hated every minute")
SUBJECTS = ("The film is", "The book was", "My evening there:", "This album is")
TRAINING = [
    (f"{subject} {text}.", label) for subject in SUBJECTS for label, texts in enumerate((BAD, GOOD)) for text in texts
]
HELD_OUT = [
    ("What a lovely concert, we smiled all the way home.", 1),
    ("A delightful little restaurant, the food was excellent.", 1),
    ("We left after ten minutes, it was awful.", 0),
    ("The hotel was dirty and the staff were rude.", 0),
]


def encode(tokenizer: Any, rows: Sequence[tuple[str, int]]) -> dict[str, torch.Tensor]:
    encoded = tokenizer([text for text, _ in rows], return_tensors="pt", padding=True)
    return {**encoded, "labels": torch.tensor([label for _, label in rows])}


def accuracy(model: Any, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float((model(**batch).logits.argmax(-1) == batch["labels"]).float().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bootstrap", help="the address of a peer of a swarm; without one, a swarm is started here")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with (
        demo_swarm(options.bootstrap) as (path, address),
        peerd.RemoteModelForSequenceClassification.from_pretrained(
            path, bootstrap=address, num_labels=2, tuning_mode="ptune", pre_seq_len=8
        ) as model,
    ):
        tokenizer = load_tokenizer(path)
        model.config.pad_token_id = tokenizer.pad_token_id
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for step in range(options.steps):
            chosen = torch.randperm(len(TRAINING))[:8].tolist()
            loss = model(**encode(tokenizer, [TRAINING[index] for index in chosen])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1}: loss {loss.item():.3f}")
        print(f"right on new texts: {accuracy(model, encode(tokenizer, HELD_OUT)):.0%}")


if __name__ == "__main__":
    main()
