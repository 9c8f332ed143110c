"""A model in several parts is read as one, and only whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peerd.compute.checkpoint.digests import file_digest, model_digest
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.gguf_models import tiny_config, tiny_model
from tests.compute.gguf_writer import metadata_of, stored_tensors, write_gguf, write_model


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The paths of the tiny llama's three parts."""
    model = tiny_model(tiny_config("llama"))
    tensors = list(stored_tensors("llama", model))
    paths = [tmp_path / f"tiny-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        split = {"split.count": 3, "split.no": number, "split.tensors.count": len(tensors)}
        # As llama.cpp splits: all else stands in the first part alone.
        metadata = {**metadata_of("llama", model.config), **split} if number == 0 else split
        write_gguf(path, "llama", metadata, dict(tensors[number::3]))
    return paths


def test_parts_are_read_as_the_whole(parts: list[Path], tmp_path: Path) -> None:
    write_model(tmp_path / "whole.gguf", "llama", tiny_model(tiny_config("llama")))
    with open_checkpoint(parts[0]) as split, open_checkpoint(tmp_path / "whole.gguf") as whole:
        assert split.name == "tiny"
        assert split.model_digest == model_digest({}, {path.name: file_digest(path) for path in parts})
        assert split.block_digest(4) == whole.block_digest(4)
        assert split.model_digest != whole.model_digest
        hidden = torch.randn(1, 5, 32)
        assert torch.equal(
            load_span(split, Span(2, 5)).forward_no_cache(hidden), load_span(whole, Span(2, 5)).forward_no_cache(hidden)
        )
        assert torch.equal(load_head(split).embedding_weight, load_head(whole).embedding_weight)


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"tiny-00002-of-00003\.gguf: cannot be opened"):
        open_checkpoint(parts[0])


def test_another_part_than_the_first_names_the_first(parts: list[Path]) -> None:
    with pytest.raises(CheckpointError, match=r"is not the first of 3 parts; open tiny-00001-of-00003\.gguf"):
        open_checkpoint(parts[1])


def test_a_part_under_another_name_says_how_parts_are_named(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(CheckpointError, match="is one of 3 parts, which are found by names like"):
        open_checkpoint(renamed)


def test_parts_of_different_models_are_refused(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"tensor .* is in tiny-00002-of-00003\.gguf too"):
        open_checkpoint(parts[0])
    write_gguf(parts[2], "llama", {"split.count": 3, "split.no": 2}, {})
    with pytest.raises(CheckpointError, match="its parts should hold 75 tensors, they hold 50"):
        open_checkpoint(parts[0])


def test_a_first_part_may_hold_no_tensors(parts: list[Path], tmp_path: Path) -> None:
    """As llama.cpp splits with `--no-tensor-first-split`, so that metadata travel alone."""
    config = tiny_config("llama")
    tensors = dict(stored_tensors("llama", tiny_model(config)))
    split = {"split.count": 3, "split.tensors.count": len(tensors)}
    first = [name for name in tensors if "blk." in name]
    rest = {name: values for name, values in tensors.items() if name not in first}
    write_gguf(parts[0], "llama", {**metadata_of("llama", config), **split, "split.no": 0}, {})
    write_gguf(parts[1], "llama", {**split, "split.no": 1}, {name: tensors[name] for name in first})
    write_gguf(parts[2], "llama", {**split, "split.no": 2}, rest)
    write_model(tmp_path / "whole.gguf", "llama", tiny_model(config))
    with open_checkpoint(parts[0]) as checkpoint, open_checkpoint(tmp_path / "whole.gguf") as whole:
        assert torch.equal(load_head(checkpoint).embedding_weight, load_head(whole).embedding_weight)
        assert checkpoint.block_digest(7) == whole.block_digest(7)
