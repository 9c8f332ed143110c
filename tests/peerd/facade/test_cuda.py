"""The head, prompts and LoRA on a GPU, beside blocks on servers: the same losses and tokens as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peerd

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.real_time,
    # peft 0.21 calls Transformers by an old name, with local models too.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [32, 38, 46, 26, 43, 38, 32, 79]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])


def train_and_answer(device: str, servers: Any, path: Path, *, lora: bool) -> tuple[list[float], torch.Tensor]:
    options: dict[str, Any] = {} if lora else {"tuning_mode": "deep_ptune", "pre_seq_len": 3}
    torch.manual_seed(1)
    with peerd.RemoteModelForCausalLM.from_pretrained(
        path, bootstrap=servers.bootstrap, device=device, **options
    ) as model:
        trained = model
        if lora:
            peft = pytest.importorskip("peft")
            config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
            trained = peft.get_peft_model(model, config)
        parameters = [each for each in trained.parameters() if each.requires_grad]
        assert {each.device.type for each in parameters} == {device}
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        ids, mask, losses = IDS.to(device), MASK.to(device), []
        for _ in range(4):
            loss = trained(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        answer = trained.eval().generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False
        )
        return losses, answer.cpu()


@pytest.mark.parametrize("lora", [False, True], ids=["deep prompts", "LoRA"])
def test_a_head_on_a_gpu_trains_and_answers_as_one_on_the_cpu(servers: Any, llama_path: Path, lora: bool) -> None:
    on_gpu, on_cpu = (train_and_answer(device, servers, llama_path, lora=lora) for device in ("cuda", "cpu"))
    assert on_gpu[0] == pytest.approx(on_cpu[0], abs=1e-3)
    assert on_gpu[0][-1] < on_gpu[0][0]
    assert torch.equal(on_gpu[1], on_cpu[1])
