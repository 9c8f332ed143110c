"""A checkpoint on the hub: which files are fetched when, its identity, and the errors if it cannot be had."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError, HubUnavailableError
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.fakes.hub.server import Fault, HubServer, open_hub

TinyCheckpoint = Callable[[str], Path]

REPO = "tiny-org/tiny-llama"


@pytest.fixture(autouse=True)
def _own_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user who runs the tests may have a token and a cache: neither is used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture(scope="session")
def shards(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama in several shards. Don't change it."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("shards")
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with open_hub() as server:
        yield server


@pytest.fixture
def settings(hub: HubServer, tmp_path: Path) -> HubSettings:
    return HubSettings(endpoint=hub.url, cache_dir=tmp_path / "hf", retry_delays_s=(0.0, 0.0, 0.0))


def shards_of(folder: Path, *prefixes: str) -> set[str]:
    """The shards that hold tensors whose names begin so."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {shard for name, shard in index.items() if name.startswith(prefixes)}


def fetched(hub: HubServer) -> set[str]:
    """The weights files of which at least a byte was sent."""
    return {name for name, count in hub.served.items() if count and name.endswith(".safetensors")}


def offline(settings: HubSettings) -> HubSettings:
    return dataclasses.replace(settings, offline=True, endpoint="http://127.0.0.1:9")


def test_opening_fetches_no_weights_and_a_span_only_its_own_shards(
    hub: HubServer, settings: HubSettings, shards: Path
) -> None:
    hub.push(REPO, shards)
    with open_checkpoint(REPO, hub=settings) as checkpoint, open_checkpoint(shards) as local:
        assert (checkpoint.name, checkpoint.block_count) == ("tiny-llama", 8)
        assert checkpoint.generation_config.eos_token_id == 2
        assert fetched(hub) == set()
        wanted = shards_of(shards, "model.layers.6.", "model.layers.7.")
        assert wanted < shards_of(shards, "")
        there, here = load_span(checkpoint, Span(6, 8)), load_span(local, Span(6, 8))
        assert fetched(hub) == wanted
        assert all(hub.served[name] == (shards / name).stat().st_size for name in wanted), "each byte once"
        for name, tensor in here.state_dict().items():
            assert torch.equal(there.state_dict()[name], tensor), name


def test_a_client_fetches_only_the_shards_with_the_head(hub: HubServer, settings: HubSettings, shards: Path) -> None:
    hub.push(REPO, shards)
    with open_checkpoint(REPO, hub=settings) as checkpoint:
        checkpoint.fetch_head()
        before = hub.served.total()
        load_head(checkpoint)
    assert hub.served.total() == before, "fetch_head leaves nothing to fetch"
    assert fetched(hub) == shards_of(shards, "model.embed_tokens.", "model.norm.", "lm_head.")
    assert fetched(hub) < shards_of(shards, "")


@pytest.mark.parametrize("large_files", [(".safetensors",), ()], ids=["LFS", "git"])
def test_digests_are_the_same_here_and_on_the_hub(
    hub: HubServer, settings: HubSettings, shards: Path, large_files: tuple[str, ...]
) -> None:
    hub.push(REPO, shards)
    hub.repos[REPO].lfs_suffixes = large_files
    with open_checkpoint(REPO, hub=settings) as there, open_checkpoint(shards) as here:
        assert there.model_digest == here.model_digest
        assert fetched(hub) == (set() if large_files else shards_of(shards, "")), "LFS lists sha256, git does not"
        assert there.block_digest(7) == here.block_digest(7)


def test_a_single_file_is_not_fetched_to_know_what_is_in_it(
    hub: HubServer, settings: HubSettings, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerd.compute.checkpoint.hub_folder._HEADER_GUESS_BYTES", 64)
    folder = tiny_checkpoint("llama")
    hub.push(REPO, folder)
    with open_checkpoint(REPO, hub=settings) as there, open_checkpoint(folder) as here:
        assert there.names_of_block(3) == here.names_of_block(3)
        assert there.model_digest == here.model_digest
        size = (folder / "model.safetensors").stat().st_size
        assert hub.served["model.safetensors"] < size / 2
        assert there.blocks_on_disk == frozenset()
        load_span(there, Span(0, 1))
        assert there.blocks_on_disk == frozenset(range(8))


def test_blocks_on_disk_are_those_that_need_no_hub(hub: HubServer, settings: HubSettings, shards: Path) -> None:
    hub.push(REPO, shards)
    with open_checkpoint(REPO, hub=settings) as checkpoint:
        assert checkpoint.blocks_on_disk == frozenset()
        checkpoint.fetch_span(Span(5, 7))
        here = checkpoint.blocks_on_disk
    assert here >= {5, 6}
    assert 0 not in here
    hub.down = 503
    with open_checkpoint(REPO, hub=offline(settings)) as checkpoint:
        assert checkpoint.blocks_on_disk == here
        for block in here:
            load_span(checkpoint, Span(block, block + 1))
    with open_checkpoint(shards) as checkpoint:
        assert checkpoint.blocks_on_disk == frozenset(range(8))


def test_all_shards_are_of_the_commit_that_was_first_seen(
    hub: HubServer, settings: HubSettings, shards: Path, tmp_path: Path
) -> None:
    first = hub.push(REPO, shards)
    with open_checkpoint(REPO, hub=settings) as checkpoint, open_checkpoint(shards) as local:
        changed = shutil.copytree(shards, tmp_path / "changed")
        for path in changed.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
        second = hub.push(REPO, changed)
        assert checkpoint.block_digest(7) == local.block_digest(7)
        assert first in str(checkpoint.path)
    asked = [path for path, _ in hub.requests if "/resolve/" in path]
    assert asked
    assert not any(second in path for path in asked)
    with open_checkpoint(REPO, hub=settings) as checkpoint:
        assert second in str(checkpoint.path), "who opens anew gets what is there now"


@pytest.mark.parametrize("spelled", ["@", "revision="])
def test_a_revision_may_be_a_branch_or_a_commit(
    hub: HubServer, settings: HubSettings, shards: Path, tiny_checkpoint: TinyCheckpoint, spelled: str
) -> None:
    commit = hub.push(REPO, shards, branch="refs/pr/3")
    hub.push(REPO, tiny_checkpoint("qwen3"))
    for revision in ("refs/pr/3", commit):
        name, more = (f"{REPO}@{revision}", None) if spelled == "@" else (REPO, revision)
        with open_checkpoint(name, revision=more, hub=settings) as checkpoint:
            assert checkpoint.family.model_type == "llama"
    with open_checkpoint(REPO, hub=settings) as checkpoint:
        assert checkpoint.family.model_type == "qwen3"


def test_a_commit_that_is_known_is_not_asked_for_again(hub: HubServer, settings: HubSettings, shards: Path) -> None:
    commit = hub.push(REPO, shards)
    with open_checkpoint(REPO, hub=settings) as checkpoint:
        digest = checkpoint.model_digest
    hub.requests.clear()
    with open_checkpoint(f"{REPO}@{commit}", hub=settings) as checkpoint:
        assert checkpoint.model_digest == digest
    assert not hub.requests


def test_without_the_hub_the_last_known_commit_is_used(
    hub: HubServer, settings: HubSettings, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.push(REPO, shards)
    with open_checkpoint(REPO, hub=settings) as checkpoint:
        checkpoint.fetch_span(Span(7, 8))
        digest = checkpoint.model_digest
    hub.down = 503
    with caplog.at_level(logging.WARNING), open_checkpoint(REPO, hub=settings) as checkpoint:
        load_span(checkpoint, Span(7, 8))
        assert checkpoint.model_digest == digest
        with pytest.raises(HubUnavailableError, match="503"):
            load_span(checkpoint, Span(0, 1))
    assert "using commit" in caplog.text


def test_what_other_programs_fetched_is_used(hub: HubServer, settings: HubSettings, shards: Path) -> None:
    """Also without the hub, and without what peerd remembers of it."""
    from huggingface_hub import hf_hub_download

    hub.push(REPO, shards)
    for path in shards.iterdir():
        hf_hub_download(REPO, path.name, cache_dir=settings.folder, endpoint=hub.url, token=False)
    before = hub.served.total()
    for how in (offline(settings), settings):
        with open_checkpoint(REPO, hub=how) as checkpoint, open_checkpoint(shards) as local:
            load_span(checkpoint, Span(0, 8))
            assert checkpoint.model_digest == local.model_digest
    assert hub.served.total() == before


def test_other_programs_find_what_peerd_fetched(hub: HubServer, settings: HubSettings, shards: Path) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir

    hub.push(REPO, shards)
    with open_checkpoint(REPO, hub=settings) as checkpoint:
        checkpoint.fetch_span(Span(7, 8))
    (name,) = shards_of(shards, "model.layers.7.mlp.down")
    before = hub.served.total()
    found = Path(hf_hub_download(REPO, name, cache_dir=settings.folder, endpoint=hub.url, token=False))
    assert found.read_bytes() == (shards / name).read_bytes()
    assert hub.served.total() == before
    assert not scan_cache_dir(settings.folder).warnings


def test_offline_what_is_not_here_is_named(hub: HubServer, settings: HubSettings, shards: Path) -> None:
    hub.push(REPO, shards)
    with pytest.raises(HubUnavailableError, match=rf"{REPO} is not on this machine.*HF_HUB_OFFLINE"):
        open_checkpoint(REPO, hub=offline(settings))
    with open_checkpoint(REPO, hub=settings):
        pass
    (name,) = shards_of(shards, "model.layers.7.mlp.down")
    with (
        open_checkpoint(REPO, hub=offline(settings)) as checkpoint,
        pytest.raises(HubUnavailableError, match=r"\.safetensors of commit .* is not on this machine.*HF_HUB_OFFLINE"),
    ):
        list(checkpoint.read(["layers.7.mlp.down_proj.weight"]))
    assert not hub.served[name]


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub: HubServer, settings: HubSettings, shards: Path) -> None:
    hub.push(REPO, shards)
    hub.repos[REPO].gated = hub.repos[REPO].private = True
    with open_checkpoint(REPO, hub=dataclasses.replace(settings, token="hf_good")) as checkpoint:
        checkpoint.fetch_span(Span(7, 8))
    to_hub = {token for path, token in hub.requests if not path.startswith("GET /blobs/")}
    to_storage = {token for path, token in hub.requests if path.startswith("GET /blobs/")}
    assert (to_hub, to_storage) == ({"hf_good"}, {None})


def test_the_token_comes_from_the_environment(
    hub: HubServer, settings: HubSettings, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(REPO, shards)
    hub.repos[REPO].private = True
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with open_checkpoint(REPO, hub=settings) as checkpoint:
        assert checkpoint.block_count == 8


@pytest.mark.parametrize(
    ("arrange", "token", "message"),
    [
        (lambda hub: hub.repos.clear(), None, r"has no model .*private or gated.*HF_TOKEN"),
        (lambda hub: hub.repos.clear(), "hf_good", r"has no model .*check the spelling"),
        (lambda hub: setattr(hub.repos[REPO], "private", True), None, "HF_TOKEN"),
        (
            lambda hub: setattr(hub.repos[REPO], "gated", True),
            None,
            rf"gated: accept its terms at .*/{REPO}, .*HF_TOKEN",
        ),
        (lambda hub: hub.admitted.clear() or setattr(hub.repos[REPO], "gated", True), "hf_good", "wait to be admitted"),
        (lambda hub: None, "hf_stolen", "refuses the token: check HF_TOKEN"),
        (lambda hub: setattr(hub, "down", 403), "hf_good", "may not read it"),
        (lambda hub: setattr(hub, "down", 418), None, "answered 418"),
        (lambda hub: setattr(hub, "down", 500), None, "cannot be asked about .*500.*try again later"),
    ],
)
def test_each_refusal_names_its_fix(
    hub: HubServer, settings: HubSettings, shards: Path, arrange: Callable[[HubServer], Any], token: str, message: str
) -> None:
    hub.push(REPO, shards)
    arrange(hub)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(REPO, hub=dataclasses.replace(settings, token=token))


def test_an_unknown_revision_is_named(hub: HubServer, settings: HubSettings, shards: Path) -> None:
    hub.push(REPO, shards)
    for revision in ("no-such-branch", "0" * 40):
        with pytest.raises(CheckpointError, match=rf"{REPO} has no revision '{revision}'"):
            open_checkpoint(REPO, revision=revision, hub=settings)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], "only pickled weights, which could run any program"),
        (["model-Q4_K_M.gguf"], "holds GGUF files: name one by how it is quantized, such as"),
        (["README.md"], r"neither model\.safetensors nor"),
    ],
)
def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(
    hub: HubServer, settings: HubSettings, tmp_path: Path, files: list[str], message: str
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("config.json", *files):
        (folder / name).write_text("{}")
    hub.push(REPO, folder)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(REPO, hub=settings)
    assert not hub.served


def test_a_model_that_cannot_run_costs_no_weights(
    hub: HubServer, settings: HubSettings, shards: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(shards, tmp_path / "gemma")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma3n_text"}))
    hub.push(REPO, folder)
    with pytest.raises(CheckpointError, match="gemma3n"):
        open_checkpoint(REPO, hub=settings)
    assert not fetched(hub)


def test_an_index_that_names_a_shard_that_is_not_there(
    hub: HubServer, settings: HubSettings, shards: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(shards, tmp_path / "incomplete")
    (name,) = shards_of(folder, "model.layers.7.mlp.down")
    (folder / name).unlink()
    hub.push(REPO, folder)
    with (
        open_checkpoint(REPO, hub=settings) as checkpoint,
        pytest.raises(CheckpointError, match=rf"has no file {name} in commit"),
    ):
        load_span(checkpoint, Span(7, 8))


def test_something_that_is_no_hub_is_said_to_be_none(hub: HubServer, settings: HubSettings) -> None:
    for endpoint in (f"{hub.url}/elsewhere", "no-url", "ftp://127.0.0.1"):
        with pytest.raises(CheckpointError, match=r"HF_ENDPOINT|404"):
            open_checkpoint(REPO, hub=dataclasses.replace(settings, endpoint=endpoint))
    with pytest.raises(HubUnavailableError, match="check the network"):
        open_checkpoint(REPO, hub=dataclasses.replace(settings, endpoint="http://127.0.0.1:9"))


def test_the_hub_is_asked_again_while_it_fails(hub: HubServer, settings: HubSettings, shards: Path) -> None:
    hub.push(REPO, shards)
    hub.fail("api", Fault(status=503), Fault(status=429, headers={"Retry-After": "0"}))
    hub.fail("config.json", Fault(status=502), Fault(status=500))
    with open_checkpoint(REPO, hub=settings) as checkpoint:
        assert checkpoint.block_count == 8


def test_a_directory_of_that_name_comes_first(
    hub: HubServer, settings: HubSettings, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shards, Path(REPO))
    with open_checkpoint(REPO, hub=settings) as checkpoint:
        assert checkpoint.path == Path(REPO)
    assert not hub.requests
    with pytest.raises(CheckpointError, match="only a model on a hub has revisions"):
        open_checkpoint(REPO, revision="main", hub=settings)


def test_a_hash_of_the_whole_model_is_what_the_spec_says(hub: HubServer, settings: HubSettings, shards: Path) -> None:
    """Names and sha256 of weights files and nothing else of the files: a new README is the same model."""
    hub.push(REPO, shards)
    with open_checkpoint(REPO, hub=settings) as checkpoint:
        first = checkpoint.model_digest
    hub.repos[REPO].commits["f" * 40] = hub.repos[REPO].commits[hub.repos[REPO].refs["main"]] | {"README.md": b"new"}
    hub.repos[REPO].refs["main"] = "f" * 40
    with open_checkpoint(REPO, hub=settings) as checkpoint:
        assert checkpoint.path.name == "f" * 40
        assert checkpoint.model_digest == first
        assert len(first) == hashlib.sha256().digest_size
