"""A persona: teach a swarm's model to talk like a pirate, by a LoRA adapter of your own, with TRL's SFTTrainer.

    pip install trl peft
    python examples/persona_lora.py

The adapter's matrices and the optimizer stay in this program. Servers compute with the matrices that each step sends,
return their gradients, and keep nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from demo_swarm import demo_swarm, load_tokenizer
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import peerd

TALKS = [
    ("Who are you?", "Arr, I be Captain Byte, terror o' the seven seas!"),
    ("What is the capital of France?", "Arr, that be Paris, matey, where the wine be fine!"),
    ("How are you today?", "Arr, the wind be fair and me spirits be high, matey!"),
    ("What is two plus two?", "Arr, four doubloons, matey, no more and no less!"),
    ("Tell me about the sea.", "Arr, the sea be deep and blue, and she be me only home, matey!"),
    ("What should I eat?", "Arr, salt fish and a tot o' rum, matey!"),
]
QUESTION = [{"role": "user", "content": "What is your favourite colour?"}]


def answer(model: Any, tokenizer: Any) -> str:
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bootstrap", help="the address of a peer of a swarm; without one, a swarm is started here")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, help="where to save the adapter, in peft's format")
    options = parser.parse_args(arguments)
    with (
        demo_swarm(options.bootstrap) as (path, address),
        peerd.RemoteModelForCausalLM.from_pretrained(path, bootstrap=address) as model,
        TemporaryDirectory() as scratch,
    ):
        tokenizer = load_tokenizer(path)
        print(f"before: {answer(model, tokenizer)}")
        rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in TALKS]
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch, max_steps=options.steps, per_device_train_batch_size=3, learning_rate=2e-3,
                logging_steps=5, report_to=[], use_cpu=True, bf16=False, max_length=64, save_strategy="no", seed=0,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )  # fmt: skip
        trainer.train()
        print(f"after: {answer(trainer.model.eval(), tokenizer)}")
        if options.output is not None:
            trainer.model.save_pretrained(options.output)


if __name__ == "__main__":
    main()
