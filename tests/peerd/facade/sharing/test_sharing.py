"""What was trained is saved, put on a hub and read again by clients, by servers and by plain peft."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peerd
from tests.fakes.hub.server import HubServer

pytestmark = [
    pytest.mark.real_time,
    # huggingface_hub 2.4 uploads by an old argument of its HTTP client.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # Of peft and huggingface_hub among themselves.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [32, 38, 46, 26, 43, 38, 32, 79]])
BASE = "org/name"
LISTEN = "/ip4/127.0.0.1/tcp/0/ws"


@pytest.fixture
def open_remote(servers: Any, hub: HubServer) -> Iterator[Any]:
    opened: list[Any] = []

    def open_it(kind: Any = peerd.RemoteModelForCausalLM, model: Any = BASE, **options: Any) -> Any:
        opened.append(kind.from_pretrained(model, bootstrap=servers.bootstrap, **options).eval())
        return opened[-1]

    yield open_it
    for model in opened:
        model.close()


def pushed(hub: HubServer, repo: str, folder: Path) -> Path:
    """The files that a repository on the hub has, in a folder."""
    folder.mkdir()
    commit = hub.repos[repo].refs["main"]
    for name, data in hub.repos[repo].commits[commit].items():
        (folder / name).write_bytes(data)
    return folder


def shaken(parameters: Any) -> None:
    """Values that nobody would have by chance."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def test_a_classifier_and_its_prompts_are_shared_by_a_hub(open_remote: Any, hub: HubServer, tmp_path: Path) -> None:
    kind = peerd.RemoteModelForSequenceClassification
    moods = {0: "glad", 1: "calm", 2: "sad"}
    model = open_remote(kind, id2label=moods, tuning_mode="deep_ptune", pre_seq_len=4)
    shaken([model.prompts.prefix, model.prompts.deep, model.score.weight])
    url = model.push_to_hub("me/moods", figures={"steps": 50, "final loss": 0.12345, "note": "a|b"})
    assert url.startswith(hub.url)
    # Neither the classes nor the prompts need to be said again.
    again = open_remote(kind, trained="me/moods")
    assert (again.config.num_labels, again.config.id2label) == (3, moods)
    assert again.config.label2id == {"glad": 0, "calm": 1, "sad": 2}
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(again(IDS).logits, expected)
    folder = pushed(hub, "me/moods", tmp_path / "files")
    for source in (folder, str(folder), f"me/moods@{hub.repos['me/moods'].refs['main']}"):
        again.score.weight.data.zero_()
        again.load_trained(source)
        with torch.no_grad():
            assert torch.equal(again(IDS).logits, expected)
    card = (folder / "README.md").read_text()
    assert f'base_model: "{BASE}"' in card
    assert f"| revision | `{hub.repos[BASE].refs['main']}` |" in card
    assert f"| model digest | `{model.swarm.blocks.facts.digest.hex()}` |" in card
    assert "| steps | 50 |\n| final loss | 0.1235 |\n| note | a\\|b |" in card
    assert 'RemoteModelForSequenceClassification.from_pretrained(\n    "org/name"' in card


def test_what_is_shared_names_no_path_of_this_machine(
    open_remote: Any, hub: HubServer, llama_path: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    prompts = open_remote(model=llama_path, tuning_mode="ptune", pre_seq_len=2)
    prompts.push_to_hub("me/prompts", private=True)
    assert hub.repos["me/prompts"].private
    lora = open_remote(model=llama_path)
    peft.get_peft_model(lora, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora", push_to_hub=True, repo_id="me/lora-of-a-folder")
    for repo in ("me/prompts", "me/lora-of-a-folder"):
        for name, data in hub.repos[repo].commits[hub.repos[repo].refs["main"]].items():
            assert str(llama_path.parent).encode() not in data, (repo, name)
            assert name != "README.md" or b"base_model:" not in data, "a hub knows only its own models"


LORA: dict[str, dict[str, Any]] = {
    "plain": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "rank-stabilised, with patterns": {
        "r": 4,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.3.mlp.up_proj": 6},
        "alpha_pattern": {"o_proj": 3},
    },
}


@pytest.fixture
def plain(local: Any) -> Any:
    """Loads an adapter into plain peft on the whole model; gives its logits."""
    peft = pytest.importorskip("peft")

    def logits(folder: Path) -> torch.Tensor:
        model = peft.PeftModel.from_pretrained(copy.deepcopy(local), folder).eval()
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=IDS).logits
        return found

    return logits


@pytest.mark.parametrize("case", LORA)
def test_lora_that_a_remote_model_saves_is_the_same_in_plain_peft(
    case: str, open_remote: Any, servers: Any, hub: HubServer, plain: Any, local: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = open_remote()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA[case]))
    shaken([parameter for name, parameter in wrapped.named_parameters() if "lora_" in name])
    model.push_to_hub("me/lora", figures={"steps": 3})
    folder = pushed(hub, "me/lora", tmp_path / "files")
    with torch.no_grad():
        found = wrapped(input_ids=IDS).logits
        assert (found - local(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(plain(folder), found, rtol=1e-3, atol=1e-3)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, hub.repos[BASE].refs["main"])
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    # What the card says works.
    code = card.split("```python\n")[1].split("```")[0].replace("THIS REPOSITORY", str(folder))
    names: dict[str, Any] = {"ADDRESS": servers.bootstrap[0]}
    exec(compile(code, "README.md", "exec"), names)
    with names["model"].base_model.model as again, torch.no_grad():
        torch.testing.assert_close(again.eval()(input_ids=IDS).logits, found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", LORA)
def test_lora_that_plain_peft_saved_is_the_same_on_clients_and_servers(
    case: str, open_remote: Any, servers: Any, hub: HubServer, plain: Any, local: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    whole = peft.get_peft_model(copy.deepcopy(local), peft.LoraConfig(task_type="CAUSAL_LM", **LORA[case]))
    shaken([parameter for name, parameter in whole.named_parameters() if "lora_" in name])
    whole.save_pretrained(tmp_path / "peft")
    expected = plain(tmp_path / "peft")
    repo = f"me/{case.split(',')[0]}"
    hub.push(repo, tmp_path / "peft")
    model = open_remote()
    bridge, blocks = model.swarm.bridge, model.swarm.blocks

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.lm_head(model.model.norm(hidden))
        return found

    async def own(adapter: Any) -> torch.Tensor:
        async with blocks.session(max_length=16, max_rows=2, adapter=adapter) as session:
            rows = [await session.step(embedded[row], row=row, start=0, want="all") for row in range(2)]
        return torch.stack(rows)

    async def served(name: str) -> torch.Tensor:
        return (await blocks.forward(embedded, adapter=name, keep=False)).output.view(embedded.shape)

    embedded = model.model.embed_tokens(IDS).detach()
    for adapter in (repo, str(tmp_path / "peft"), tmp_path / "peft"):
        torch.testing.assert_close(logits(bridge.call(own, adapter)), expected, rtol=1e-3, atol=1e-3)
    ids = [servers.bridge.call(peer.load_adapter, peer.served[0], "poet", repo) for peer in servers.peers]
    assert len(set(ids)) == 1
    try:
        torch.testing.assert_close(logits(bridge.call(served, ids[0])), expected, rtol=1e-3, atol=1e-3)
    finally:
        for peer in servers.peers:
            servers.bridge.call(_unload, peer, ids[0])
    wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft")).eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_server_fetches_its_adapters_as_the_peer_was_told_to_use_the_hub(
    servers: Any, hub: HubServer, llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (1, 64), "B": (64, 1)}
    tensors = {name.format(block, side): torch.ones(shape) for block in range(8) for side, shape in shapes.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    hub.push("me/rhymes", adapter)
    settings = peerd.HubSettings(endpoint=hub.url, token="hf_good", cache_dir=tmp_path / "cache")
    # What the environment says is another hub, where nobody answers.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nowhere"))
    spec = peerd.ServeSpec(
        llama_path, peerd.Span(0, 2), kv_tokens=64, throughput=1.0, adapters=(("poet", "me/rhymes"),)
    )
    peer, close = servers.bridge.hold(peerd.open_peer(listen=[LISTEN], serve=[spec], hub=settings))
    try:
        assert [adapter.split("@")[0] for adapter in peer.served[0].task.adapters] == ["poet"]
    finally:
        close()
    assert not (tmp_path / "nowhere").exists()


async def _unload(peer: peerd.Peer, adapter: str) -> None:
    peer.unload_adapter(peer.served[0], adapter)


def test_what_does_not_fit_is_said_and_the_model_stays_usable(
    open_remote: Any, hub: HubServer, servers: Any, tmp_path: Path
) -> None:
    save_file(
        {"prompts.prefix": torch.zeros(2, 64)},
        tmp_path / "trained.safetensors",
        metadata={"model_digest": "00" * 32, "base_model": "org/other"},
    )
    with pytest.raises(ValueError, match=r"trained for another model, org/other .*: load it beside that model"):
        open_remote(trained=tmp_path)
    with pytest.raises(peerd.CheckpointError, match="has no model me/nothing"):
        open_remote(trained="me/nothing")
    with pytest.raises(peerd.CheckpointError, match=r"org/name has no file trained\.safetensors"):
        open_remote(trained=BASE)
    model = open_remote(tuning_mode="ptune", pre_seq_len=2)
    model.save_pretrained(tmp_path / "short")
    longer = open_remote(tuning_mode="ptune", pre_seq_len=3)
    with pytest.raises(ValueError, match=r"prompts\.prefix is \[2, 64\], here \[3, 64\]"):
        longer.load_trained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"nothing was trained here"):
        open_remote().save_pretrained(tmp_path / "none")
    longer.load_trained(_saved(longer, tmp_path / "longer"))


SAVED_BY: dict[str, Callable[[Any, Any, Path], None]] = {
    "the model": lambda model, wrapped, folder: model.save_pretrained(folder),
    "peft": lambda model, wrapped, folder: wrapped.save_pretrained(folder),
}


@pytest.fixture
def another(tmp_path: Path) -> Path:
    """A model of the same shapes with other weights. No server has it, which loading an adapter does not notice."""
    torch.manual_seed(8)
    config = LlamaConfig(
        num_hidden_layers=8, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=260, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "another")
    return tmp_path / "another"


# peft says that a configuration was renamed, and looks for the base model's vocabulary on the hub when it saves.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("saved_by", SAVED_BY)
def test_a_lora_of_the_same_shapes_that_was_trained_for_another_model_is_refused(
    saved_by: str, open_remote: Any, another: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    other = open_remote(model=another)
    wrapped = peft.get_peft_model(other, config)
    shaken([parameter for name, parameter in wrapped.named_parameters() if "lora_" in name])
    SAVED_BY[saved_by](other, wrapped, tmp_path / "foreign")
    # A configuration that was used for one model may be used for the next.
    model = open_remote()
    own = peft.get_peft_model(model, config)
    SAVED_BY[saved_by](model, own, tmp_path / "ours")
    with torch.no_grad():
        expected = model(IDS).logits
        refused = r"was trained for another model, .*another \(digest \w+, this one has \w+\): .* any_base=True"
        # peft says nothing when it puts a further adapter beside the first; the first forward with it is refused.
        own.load_adapter(tmp_path / "foreign", "second")
        own.set_adapter("second")
        with pytest.raises(ValueError, match=f"adapter 'second' {refused}"):
            own(input_ids=IDS)
        own.set_adapter("default")
        torch.testing.assert_close(own(input_ids=IDS).logits, expected)
        fresh = open_remote()
        with pytest.raises(ValueError, match=f"adapter 'default' {refused}"):
            peft.PeftModel.from_pretrained(fresh, tmp_path / "foreign")
        # peft had put its layers into the model already.
        assert isinstance(fresh.model.layers[3].self_attn.q_proj, nn.Linear)
        assert isinstance(fresh.lm_head, nn.Linear)
        torch.testing.assert_close(fresh(IDS).logits, expected)
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
        torch.testing.assert_close(again(input_ids=IDS).logits, expected)
        allowed = peft.PeftModel.from_pretrained(open_remote(any_base=True), tmp_path / "foreign")
        assert (allowed(input_ids=IDS).logits - expected).abs().max() > 0.01


def test_prompts_of_another_model_are_taken_where_the_program_allows_it(
    open_remote: Any, another: Path, tmp_path: Path
) -> None:
    prompts = open_remote(model=another, tuning_mode="ptune", pre_seq_len=2)
    folder = _saved(prompts, tmp_path / "prompts")
    with pytest.raises(ValueError, match=r"trained for another model, .*: load it beside that model.* any_base=True"):
        open_remote(trained=folder)
    allowed = open_remote(trained=folder, any_base=True)
    assert torch.equal(allowed.prompts.prefix, prompts.prompts.prefix)


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
