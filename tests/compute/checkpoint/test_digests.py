"""Digests tell different weights and configurations apart, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peerd.compute.checkpoint.digests import file_digest, tensors_digest
from peerd.compute.checkpoint.digests import model_digest as digest_of_model
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.checkpoint.weights import StoredBytes
from peerd.compute.errors import CheckpointError

TinyCheckpoint = Callable[[str], Path]

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/discovery/digests.json").read_text())


@pytest.fixture
def copied(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copied"))


def model_digest(path: Path) -> bytes:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.model_digest


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_copy_in_another_place_is_the_same_model(tiny_checkpoint: TinyCheckpoint, copied: Path) -> None:
    assert len(model_digest(copied)) == 32
    assert model_digest(copied) == model_digest(tiny_checkpoint("llama"))


def test_the_writer_of_the_config_does_not_matter(tiny_checkpoint: TinyCheckpoint, copied: Path) -> None:
    edit_config(copied, transformers_version="5.99.0", _name_or_path="somewhere", torch_dtype="float16")
    assert model_digest(copied) == model_digest(tiny_checkpoint("llama"))


def test_another_configuration_is_another_model(tiny_checkpoint: TinyCheckpoint, copied: Path) -> None:
    edit_config(copied, rms_norm_eps=1e-5)
    assert model_digest(copied) != model_digest(tiny_checkpoint("llama"))


def test_other_weights_are_another_model_and_change_only_their_block(
    tiny_checkpoint: TinyCheckpoint, copied: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.5.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with open_checkpoint(copied) as changed, open_checkpoint(tiny_checkpoint("llama")) as original:
        assert changed.model_digest != original.model_digest
        differing = [block for block in range(8) if changed.block_digest(block) != original.block_digest(block)]
    assert differing == [5]


@pytest.mark.parametrize("vector", VECTORS["models"], ids=lambda vector: vector["name"])
def test_a_models_digest_is_what_the_spec_says(vector: dict[str, Any]) -> None:
    files = {name: bytes.fromhex(sha256) for name, sha256 in vector["files"].items()}
    assert digest_of_model(vector["config"], files).hex() == vector["digest"]


@pytest.mark.parametrize("vector", VECTORS["blocks"], ids=lambda vector: vector["name"])
def test_a_blocks_digest_is_what_the_spec_says(vector: dict[str, Any]) -> None:
    tensors = [
        StoredBytes(each["name"], each["dtype"], tuple(each["shape"]), memoryview(bytes.fromhex(each["data"])))
        for each in vector["tensors"]
    ]
    assert tensors_digest(tensors).hex() == vector["digest"]


def test_a_block_digest_covers_name_dtype_shape_and_bytes() -> None:
    data = memoryview(bytes(8))
    variants = [
        StoredBytes("a", "F32", (2,), data),
        StoredBytes("b", "F32", (2,), data),
        StoredBytes("a", "I32", (2,), data),
        StoredBytes("a", "F32", (1, 2), data),
        StoredBytes("a", "F32", (2,), memoryview(bytes(7) + b"\1")),
    ]
    assert len({tensors_digest([variant]) for variant in variants}) == 5
    assert tensors_digest([]) != tensors_digest(variants[:1]) != tensors_digest(variants[:2])


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"first")
    first = hashlib.sha256(b"first").digest()
    assert file_digest(path) == first
    status = path.stat()
    path.write_bytes(b"other")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_digest(path) == first, "same size, time and inode: not read again"
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert file_digest(path) == hashlib.sha256(b"other").digest()


@pytest.mark.parametrize("damage", [b"", b"{}", b"null", b'{"sha256": "zz"}', b'{"sha256": "00"}'])
def test_a_damaged_cache_entry_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    expected = file_digest(path)
    (entry,) = (tmp_path / "cache").rglob("digests/*")
    entry.write_bytes(damage)
    assert file_digest(path) == expected
    assert json.loads(entry.read_bytes())["sha256"] == expected.hex()


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    assert file_digest(path) == hashlib.sha256(b"weights").digest()


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        file_digest(tmp_path / "absent.safetensors")


def test_reading_for_a_digest_leaves_the_tensors_as_they_are(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_checkpoint(tiny_checkpoint("llama")) as checkpoint:
        names = checkpoint.names_of_block(2)
        before = dict(checkpoint.read(names))
        assert checkpoint.block_digest(2) == checkpoint.block_digest(2)
        assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.read(names))
