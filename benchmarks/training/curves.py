"""Training curves of one model, local or remote: the trained parameters, the method, and the losses.

A curve through a swarm must equal the local one, apart from rounding. To show the effect of rounding, there is a pair
of local runs whose trained parameters differ by one unit in the last place at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

PROMPT_POSITIONS, RANK = 8, 4
_CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}


@dataclass(frozen=True, slots=True)
class Training:
    """The number of steps, the learning rate, and the data: token ids `[rows, columns]`, the same at each step."""

    ids: torch.Tensor
    steps: int = 50
    rate: float = 1e-3


@dataclass(frozen=True, slots=True)
class Curve:
    """A method's losses through the swarm, locally, and locally from parameters that differ by one unit in the last
    place.
    """

    swarm: list[float]
    local: list[float]
    nudged: list[float]

    @property
    def apart(self) -> float:
        """The largest difference between the swarm's losses and the local ones."""
        return _apart(self.swarm, self.local)

    @property
    def rounding(self) -> float:
        """The largest difference between the two local runs."""
        return _apart(self.local, self.nudged)


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


OpenRemote = Callable[..., Any]
"""Opens a remote model, as a context manager, with `from_pretrained`'s options."""
Method = Callable[[OpenRemote, Callable[[], Any], Training], Curve]


def prompts(mode: str) -> Method:
    """`tuning_mode=mode` through the swarm, and locally the same by hooks on the whole model's layers."""

    def run(open_remote: OpenRemote, open_local: Callable[[], Any], training: Training) -> Curve:
        with open_remote(tuning_mode=mode, pre_seq_len=PROMPT_POSITIONS) as model:
            start = model.prompts.prefix.detach().clone()
            swarm = losses(model, [each for each in model.parameters() if each.requires_grad], training)
        blocks = model.config.num_hidden_layers if mode == "deep_ptune" else 0
        whole = Prompted(open_local().requires_grad_(False), start, blocks)
        local = losses(whole, list(whole.trained), training)
        again = Prompted(whole.model, nudged(start), blocks)
        return Curve(swarm, local, losses(again, list(again.trained), training))

    return run


class Prompted:
    """A whole model with trained prompts before each row, and with `blocks` also in that many of its blocks."""

    def __init__(self, model: Any, start: torch.Tensor, blocks: int) -> None:
        self.model = model
        self.prefix = nn.Parameter(start.clone())
        self.deep = nn.Parameter(torch.zeros(blocks, *start.shape))

    @property
    def trained(self) -> Iterator[nn.Parameter]:
        yield self.prefix
        if len(self.deep):
            yield self.deep

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        embeds = self.model.get_input_embeddings()(input_ids)
        embeds = torch.cat((self.prefix.expand(len(embeds), -1, -1), embeds), 1)
        # The prediction of the last prompt is not counted, because a remote model gives no logits for its prompts.
        unknown = torch.full((len(labels), len(self.prefix) + 1), -100)
        with self._hooks():
            return self.model(inputs_embeds=embeds, labels=torch.cat((unknown, labels[:, 1:]), 1), use_cache=False)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        layers = self.model.base_model.layers
        handles = [layers[block].register_forward_pre_hook(self._adding(block)) for block in range(len(self.deep))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _adding(self, block: int) -> Any:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
            count = len(self.prefix)
            return (torch.cat((args[0][:, :count] + self.deep[block], args[0][:, count:]), 1), *args[1:])

        return add


def lora(open_remote: OpenRemote, open_local: Callable[[], Any], training: Training) -> Curve:
    """peft's LoRA on queries and values, in a plain training loop."""
    with open_remote() as model:
        swarm = _lora_losses(model, training)
    return Curve(swarm, _lora_losses(open_local(), training), _lora_losses(open_local(), training, nudge=True))


def _lora_losses(model: Any, training: Training, *, nudge: bool = False) -> list[float]:
    adapted = _with_lora(model, nudge=nudge)
    return losses(adapted, [each for each in adapted.parameters() if each.requires_grad], training)


def _with_lora(model: Any, *, nudge: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**_CAUSAL, r=RANK, target_modules=["q_proj", "v_proj"]))
    if nudge:
        first = next(each for each in adapted.parameters() if each.requires_grad)
        first.data.copy_(nudged(first.data))
    return adapted


def trainer(open_remote: OpenRemote, open_local: Callable[[], Any], training: Training) -> Curve:
    """The same by Transformers' Trainer, with its loop, schedule and optimizer."""
    with open_remote() as model:
        swarm = _trainer_losses(model, training)
    return Curve(swarm, _trainer_losses(open_local(), training), _trainer_losses(open_local(), training, nudge=True))


def _trainer_losses(model: Any, training: Training, *, nudge: bool = False) -> list[float]:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in training.ids]
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=training.steps,
            per_device_train_batch_size=len(rows),
            learning_rate=training.rate,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=0,
            disable_tqdm=True,
        )
        run = Trainer(model=_with_lora(model, nudge=nudge), args=arguments, train_dataset=rows)
        # It prints each step where there is no progress bar.
        run.remove_callback(PrinterCallback)
        run.train()
    return [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]


METHODS: dict[str, Method] = {
    "shallow prompts": prompts("ptune"),
    "deep prompts": prompts("deep_ptune"),
    "LoRA": lora,
    "LoRA by Trainer": trainer,
}


def losses(model: Callable[..., Any], parameters: Sequence[nn.Parameter], training: Training) -> list[float]:
    """The loss of each step of AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=training.rate)
    found = []
    for _ in range(training.steps):
        loss = model(input_ids=training.ids, labels=training.ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def nudged(values: torch.Tensor) -> torch.Tensor:
    """Move each value up by one unit in the last place."""
    return torch.nextafter(values, torch.full_like(values, float("inf")))


def small_llama(folder: Path, *, blocks: int = 8, width: int = 64) -> Path:
    """A random Llama whose weights are large enough that every part matters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        num_hidden_layers=blocks,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=260,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.05))
    model.save_pretrained(folder)
    return folder
