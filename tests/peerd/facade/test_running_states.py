"""A model with running states goes back, forks and changes servers beneath a Transformers program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList

import peerd
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.transformers_compat import cache_argument
from tests.compute.tiny_families import tiny_model
from tests.peerd.facade.conftest import Servers
from tests.peerd.facade.test_failover import SPANS, KillAt

pytestmark = [pytest.mark.real_time, pytest.mark.slow]

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [32, 38, 46, 26, 43, 38, 32, 79]])
GREEDY = {"max_new_tokens": 24, "do_sample": False}


# A convolution, whose rows can be cut in Transformers too; blocks that return pairs; a model without attention.
@pytest.fixture(scope="module", params=["lfm2", "bamba", "mamba"])
def local(request: pytest.FixtureRequest) -> Any:
    model = tiny_model(FAMILIES[request.param]).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            # So that rounding decides no token.
            parameter.mul_(0.5 if parameter.ndim > 1 else 1)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.fixture(scope="module")
def path(local: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    local.save_pretrained(folder)
    return folder


@pytest.fixture
def servers(path: Path) -> Iterator[Servers]:
    """Two chains of two servers."""
    serving = Servers()
    serving.serve(path, *SPANS)
    yield serving
    serving.close()


@pytest.fixture
def remote(servers: Servers, path: Path) -> Iterator[Any]:
    with peerd.RemoteModelForCausalLM.from_pretrained(path, bootstrap=servers.bootstrap) as model:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        yield model


def test_beams_guesses_and_gradients_are_those_of_the_whole_model(local: Any, remote: Any, servers: Servers) -> None:
    plain = local.generate(IDS[:1], **GREEDY)
    assert torch.equal(remote.generate(IDS[:1], **GREEDY), plain)
    if not local._is_stateful:
        # Guesses that are wrong are cut off in the middle of a step. Transformers guesses for no other models.
        assert torch.equal(remote.generate(IDS[:1], prompt_lookup_num_tokens=4, **GREEDY), plain)
        assert torch.equal(remote.generate(IDS[:1], assistant_early_exit=4, **GREEDY), plain)
    gradients = []
    for model in (local, remote):
        leaf = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=leaf, labels=IDS, use_cache=False).loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    # Both servers of the chain die beneath the beams; rows are forked before and after.
    options = {"attention_mask": torch.ones_like(IDS), "num_beams": 3, **GREEDY}
    killer = KillAt(remote, servers, {4: 1, 10: 0})
    found = remote.generate(IDS, logits_processor=LogitsProcessorList([killer]), **options)
    assert torch.equal(found, local.generate(IDS, **options))
    # A busy machine may make a healthy server look dead too.
    assert killer.session.failovers >= 2
    # States that the whole model computed cannot move to servers.
    cache = DynamicCache(config=local.config)
    local(IDS, **{cache_argument(type(local).forward): cache})
    with pytest.raises(ValueError, match="holds running states of local blocks"):
        remote(IDS[:, :1], **{cache_argument(type(remote).forward): cache})
