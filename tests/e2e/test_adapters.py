"""The real model under served and uploaded adapters at once gives the tokens that peft gives."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import trio

import peerd
from peerd.cli.processes import open_peer_processes

pytestmark = [pytest.mark.real_time, pytest.mark.model, pytest.mark.processes]

PROMPT = "The sea is"
NEW_TOKENS = 10
TARGETS = {"poet": ["q_proj", "v_proj"], "clerk": ["o_proj", "down_proj"]}


@pytest.fixture(scope="module")
def adapters(reference, tmp_path_factory) -> dict[str, Path]:
    """Two adapters of the real model, with what it answers under each kept in `reference`."""
    with warnings.catch_warnings():
        # These warnings come from peft itself, with a newer Transformers than it knows.
        warnings.simplefilter("ignore")
        return make_adapters(reference, tmp_path_factory.mktemp("adapters"))


def make_adapters(reference, folder):
    from peft import LoraConfig, get_peft_model

    made = {}
    plain = reference.model
    for name, targets in TARGETS.items():
        torch.manual_seed(len(name))
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        adapted = get_peft_model(plain, config).eval()
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(folder / name)
        made[name] = folder / name
        plain = adapted.unload()
    return made


def answer_under(reference, folder, ids):
    """peft's own answer, up to where rounding may decide."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(reference.model, folder).eval()
        answer = type(reference).answer
        plain, reference.model, answers, reference._answers = reference.model, adapted, reference._answers, {}
        try:
            return answer(reference, ids, NEW_TOKENS)
        finally:
            reference.model, reference._answers = plain, answers
            adapted.unload()


async def test_two_clients_with_different_adapters_and_one_with_none_at_once(adapters, reference, model_path):
    ids = reference.encode(PROMPT)
    expected = {name: answer_under(reference, folder, ids) for name, folder in adapters.items()}
    expected["none"] = reference.answer(ids, NEW_TOKENS)
    assert len({answer.token_ids for answer in expected.values()}) == 3
    serve = ("--model", str(model_path), "--kv-tokens", "1024", "--quantize", "none")
    serve += ("--adapter", f"poet={adapters['poet']}")
    async with open_peer_processes(threads=1) as processes:
        first = await processes.start("--serve-blocks", "0:15", *serve)
        await processes.start("--serve-blocks", "15:30", *serve, "--bootstrap", str(first.address))
        async with peerd.open_peer(bootstrap=[first.address]) as peer, peer.model(model_path) as model:
            chosen = {"poet": "poet", "clerk": adapters["clerk"], "none": None}
            said = {
                name: model.generate(ids, adapter=adapter, temperature=0, max_new_tokens=NEW_TOKENS)
                for name, adapter in chosen.items()
            }

            async def run(generation):
                async for _ in generation:
                    pass

            async with trio.open_nursery() as nursery:
                for generation in said.values():
                    nursery.start_soon(run, generation)
            with pytest.raises(peerd.NoChain, match=r"has an adapter 'critic' .* there is poet@[0-9a-f]{16}$"):
                await anext(model.generate(ids, adapter="critic").tokens())
    for name, generation in said.items():
        decisive = expected[name].decisive
        assert len(decisive) >= NEW_TOKENS // 2
        assert tuple(generation.token_ids[: len(decisive)]) == decisive, name
