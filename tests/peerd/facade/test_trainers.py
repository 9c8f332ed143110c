"""Trainer, TRL, accelerate and pipelines run on a remote model as on the whole one."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import peerd

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.slow,
    # Of these libraries among themselves; local models meet the same.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CAUSAL = {"task_type": "CAUSAL_LM"}


class Texts(Dataset):  # type: ignore[type-arg]
    """Right-padded rows of random tokens with labels."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        length = 6 + index % 5
        ids = torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(index)).tolist()
        padding = 12 - length
        return {
            "input_ids": ids + [257] * padding,
            "attention_mask": [1] * length + [0] * padding,
            "labels": ids + [-100] * padding,
        }


@pytest.fixture
def open_remote(servers: Any, llama_path: Path) -> Iterator[Callable[..., Any]]:
    opened: list[Any] = []

    def open_it(**options: Any) -> Any:
        model = peerd.RemoteModelForCausalLM.from_pretrained(llama_path, bootstrap=servers.bootstrap, **options)
        opened.append(model)
        return model

    yield open_it
    for model in opened:
        model.close()


def logged(trainer: Any, name: str) -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 2}, {"gradient_checkpointing": True}], ids=str)
def test_trainer_gives_the_losses_of_local_training(
    options: dict[str, Any], open_remote: Callable[..., Any], local: Any, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    found = {}
    for name, model in (("remote", open_remote()), ("local", copy.deepcopy(local))):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**CAUSAL, r=4, target_modules=["q_proj", "v_proj"]))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=4,
            report_to=[],
            use_cpu=True,
            seed=0,
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(model=adapted, args=arguments, train_dataset=Texts(), eval_dataset=Texts())
        trainer.train()
        found[name] = logged(trainer, "loss"), logged(trainer, "eval_loss")
    assert len(found["local"][0]) == 4
    assert found["remote"][0] == pytest.approx(found["local"][0], abs=1e-3)
    assert found["remote"][1] == pytest.approx(found["local"][1], abs=1e-3)
    saved = peft.PeftModel.from_pretrained(copy.deepcopy(local), tmp_path / "remote" / "checkpoint-4")
    assert sum("lora_" in name for name, _ in saved.named_parameters()) == 2 * 2 * 8


def test_trainer_saves_prompts_without_peft(open_remote: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = open_remote(tuning_mode="ptune", pre_seq_len=4)
    before = model.prompts.prefix.detach().clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=3e-2, save_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Texts()).train()
    again = open_remote(tuning_mode="ptune", pre_seq_len=4)
    again.load_trained(tmp_path / "checkpoint-2")
    assert torch.equal(again.prompts.prefix, model.prompts.prefix)
    assert not torch.equal(again.prompts.prefix, before)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed: make test-trl")
def test_sft_trainer_gives_the_losses_of_local_training(
    open_remote: Callable[..., Any], local: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    from trl import SFTConfig, SFTTrainer

    rows = datasets.Dataset.from_list([{"text": f"row {number} of some text"} for number in range(12)])
    found = []
    for model in (open_remote(), copy.deepcopy(local)):
        torch.manual_seed(0)
        arguments = SFTConfig(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
            report_to=[], use_cpu=True, bf16=False, seed=0, save_steps=3, disable_tqdm=True, max_length=64,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=byte_tokenizer,
            peft_config=peft.LoraConfig(**CAUSAL, r=4, target_modules=["q_proj", "v_proj"]),
        )
        trainer.train()
        found.append(logged(trainer, "loss"))
    assert len(found[0]) == 3
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_accelerate_accumulates_and_clips(open_remote: Callable[..., Any], local: Any) -> None:
    from accelerate import Accelerator

    found = []
    for model in (open_remote(), copy.deepcopy(local)):
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**CAUSAL, r=2, target_modules=["q_proj"]))
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
        rows = DataLoader([{key: torch.tensor(value) for key, value in Texts()[i].items()} for i in range(4)], 2)
        prepared, optimizer, batches = accelerator.prepare(adapted, optimizer, rows)
        losses = []
        for _ in range(2):
            for batch in batches:
                with accelerator.accumulate(prepared):
                    loss = prepared(**batch).loss
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
        found.append(losses)
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert found[0][2] < found[0][0]


def test_a_pipeline_answers_as_locally(remote: Any, local: Any, byte_tokenizer: Any) -> None:
    from transformers import pipeline

    byte_tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": "hello"}]
    found = []
    for model in (remote, local):
        answer = pipeline("text-generation", model=model, tokenizer=byte_tokenizer)
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        one, batch = answer("the quick brown", **options), answer(["a", "longer text", "x"], batch_size=3, **options)
        found.append((one, batch, answer(chat, **options)))
    assert found[0] == found[1]
