"""GGUF files on a hub: only the bytes of the wanted tensors travel, and they are kept and counted like files."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from peerd.compute.adapters.source import open_directory
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.gguf import on_hub
from peerd.compute.checkpoint.hub.disk_ledger import DiskLedger
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.checkpoint.tokenizer import load_tokenizer
from peerd.compute.errors import AdapterError, CheckpointError, DiskFullError, HubUnavailableError
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.gguf_models import tiny_config, tiny_model
from tests.compute.gguf_writer import metadata_of, stored_tensors, write_gguf
from tests.fakes.hub.server import Fault, HubServer, open_hub

REPO = "org/tiny-GGUF"
FILE = "tiny-Q8_0.gguf"
PARTS = [f"BF16/tiny-BF16-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
# Longer than one piece of the header, and longer than what is kept of arrays.
WORDS = ["w", "o", "r", "d", "wo", "rd", *(f"word{number}" for number in range(87))]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *WORDS],
    "tokenizer.ggml.merges": ["w o", "r d"],
}


@pytest.fixture(autouse=True)
def _small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(on_hub, "HEADER_PIECE_BYTES", 2000)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in one file and in three parts, of which the first has no tensors."""
    folder = tmp_path_factory.mktemp("published")
    model = tiny_model(tiny_config("llama"))
    metadata = metadata_of("llama", model.config) | TOKENIZER
    tensors = dict(stored_tensors("llama", model))
    write_gguf(folder / FILE, "llama", metadata, tensors)
    (folder / "BF16").mkdir()
    for number, name in enumerate(PARTS):
        split = {"split.count": 3, "split.no": number, "split.tensors.count": len(tensors)}
        part = dict(list(tensors.items())[number - 1 :: 2]) if number else {}
        write_gguf(folder / name, "llama", split if number else metadata | split, part)
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[HubServer]:
    with open_hub() as server:
        paths = [path for path in published.rglob("*") if path.is_file()]
        files = {str(path.relative_to(published)): path.read_bytes() for path in paths}
        server.commit(REPO, files | {"mmproj-F16.gguf": b"", "README.md": b"hello"})
        yield server


@pytest.fixture
def settings(hub: HubServer, tmp_path: Path) -> HubSettings:
    return HubSettings(endpoint=hub.url, cache_dir=tmp_path / "hf", retry_delays_s=(0.0, 0.0))


def bytes_of(checkpoint: Checkpoint, blocks: Span) -> int:
    return sum(
        sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in load_span(checkpoint, blocks).layers
    )


def same_span(one: Checkpoint, other: Checkpoint, span: Span) -> bool:
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    return torch.equal(load_span(one, span).forward_no_cache(hidden), load_span(other, span).forward_no_cache(hidden))


@pytest.mark.parametrize("name", [f"{REPO}:Q8_0", f"{REPO}:q8_0@main", f"{REPO}/{FILE}"])
def test_only_the_tensors_of_the_span_travel(hub: HubServer, settings: HubSettings, published: Path, name: str) -> None:
    span = Span(3, 5)
    with open_checkpoint(published / FILE) as local, open_checkpoint(name, hub=settings) as checkpoint:
        header = hub.served[FILE]
        # Between the header's pieces and its end there is a part of a piece.
        assert header < local.bytes_read + 2 * on_hub.HEADER_PIECE_BYTES
        assert checkpoint.download_bytes(span) == bytes_of(local, span)
        assert checkpoint.blocks_on_disk == frozenset()
        checkpoint.fetch_span(span)
        assert hub.served[FILE] - header == bytes_of(local, span)
        assert checkpoint.blocks_on_disk == {3, 4}
        assert same_span(checkpoint, local, span)
        assert checkpoint.model_digest == local.model_digest
        assert checkpoint.block_digest(4) == local.block_digest(4)
        assert (checkpoint.name, checkpoint.hub_id) == (local.name, f"{REPO}/{FILE}")
        assert len(checkpoint.commit) == 40
    assert hub.served[FILE] - header == bytes_of_file(published, span)


def bytes_of_file(published: Path, span: Span) -> int:
    with open_checkpoint(published / FILE) as local:
        return bytes_of(local, span)


def test_a_model_in_parts_is_read_across_them(hub: HubServer, settings: HubSettings, published: Path) -> None:
    with (
        open_checkpoint(published / PARTS[0]) as local,
        open_checkpoint(f"{REPO}:BF16", hub=settings) as checkpoint,
        # A part names its model as well as the first does.
        open_checkpoint(f"{REPO}/{PARTS[2]}", hub=settings) as named,
    ):
        before = hub.served.total()
        assert same_span(checkpoint, local, Span(6, 8))
        assert hub.served.total() - before == bytes_of(local, Span(6, 8))
        assert checkpoint.model_digest == local.model_digest == named.model_digest
        assert checkpoint.hub_id == named.hub_id == f"{REPO}/{PARTS[0]}"
        assert checkpoint.name == "tiny-BF16"


def test_a_client_fetches_the_head_and_has_the_tokenizer(
    hub: HubServer, settings: HubSettings, published: Path
) -> None:
    with open_checkpoint(published / FILE) as local, open_checkpoint(f"{REPO}:Q8_0", hub=settings) as checkpoint:
        before = hub.served[FILE]
        checkpoint.fetch_head()
        head, own = load_head(checkpoint), load_head(local)
        assert hub.served[FILE] - before == sum(tensor.nbytes for tensor in own.model.state_dict().values())
        assert torch.equal(head.embedding_weight, own.embedding_weight)
        ours, theirs = load_tokenizer(checkpoint), load_tokenizer(local)
        assert ours.get_vocab() == theirs.get_vocab()
        assert hub.served[FILE] - before == sum(tensor.nbytes for tensor in own.model.state_dict().values())


def test_what_is_here_is_not_fetched_again_nor_needs_the_hub(hub: HubServer, settings: HubSettings) -> None:
    with open_checkpoint(f"{REPO}:Q8_0", hub=settings) as checkpoint:
        checkpoint.fetch_span(Span(2, 6))
    before = hub.served.total()
    hub.down = 503
    with open_checkpoint(f"{REPO}:Q8_0", hub=dataclasses.replace(settings, offline=True)) as checkpoint:
        assert checkpoint.blocks_on_disk == {2, 3, 4, 5}
        load_span(checkpoint, Span(3, 6))
        with pytest.raises(HubUnavailableError, match="is not on this machine"):
            load_span(checkpoint, Span(0, 1))
    assert hub.served.total() == before


def test_a_whole_file_that_is_here_is_read_as_it_is(hub: HubServer, settings: HubSettings, published: Path) -> None:
    with open_checkpoint(f"{REPO}:Q8_0", hub=settings) as checkpoint:
        commit = checkpoint.commit
    folder = settings.folder / f"models--{REPO.replace('/', '--')}" / "snapshots" / commit
    shutil.copy(published / FILE, folder / FILE)
    before = hub.served.total()
    with open_checkpoint(f"{REPO}:Q8_0", hub=settings) as checkpoint, open_checkpoint(published / FILE) as local:
        assert checkpoint.download_bytes(Span(0, 8)) == 0
        assert same_span(checkpoint, local, Span(0, 2))
        assert checkpoint.model_digest == local.model_digest
    assert hub.served.total() == before


def test_pieces_count_and_are_deleted_like_files(settings: HubSettings, published: Path) -> None:
    with open_checkpoint(published / FILE) as local:
        block = bytes_of(local, Span(0, 1))
    ledger = DiskLedger(settings.own_folder)
    with open_checkpoint(f"{REPO}:Q8_0", hub=settings) as checkpoint:
        header = sum(entry.size for entry in ledger.entries().values())
    bounded = dataclasses.replace(settings, disk_bytes=header + 3 * block)
    with open_checkpoint(f"{REPO}:Q8_0", hub=bounded) as checkpoint:
        assert checkpoint.disk_bytes == 3 * block
        with pytest.raises(DiskFullError, match="raise it, or serve fewer blocks"):
            checkpoint.fetch_span(Span(0, 4))
        checkpoint.fetch_span(Span(0, 2))
    with open_checkpoint(f"{REPO}:Q8_0", hub=bounded) as checkpoint:
        checkpoint.fetch_span(Span(1, 2))
        checkpoint.fetch_span(Span(5, 7))
        # Block 0 was used least recently.
        assert checkpoint.blocks_on_disk == {1, 5, 6}
    assert sum(entry.size for entry in ledger.entries().values()) == header + 3 * block


def test_faults_of_the_hub_cost_no_wrong_byte(hub: HubServer, settings: HubSettings, published: Path) -> None:
    with open_checkpoint(published / FILE) as local, open_checkpoint(f"{REPO}:Q8_0", hub=settings) as checkpoint:
        hub.fail(FILE, Fault(cut_after=4096), Fault(ignore_range=True))
        assert same_span(checkpoint, local, Span(4, 5))


def test_a_header_without_end_is_not_fetched(hub: HubServer, settings: HubSettings) -> None:
    endless = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    hub.commit("org/endless", {"a-Q8_0.gguf": endless + (10**9).to_bytes(8, "little") + bytes(4000)})
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint("org/endless:Q8_0", hub=settings)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (f"{REPO}:Q4_K_M", "no GGUF file is called so; there is BF16/tiny-BF16-00001-of-00003.gguf, tiny-Q8_0.gguf"),
        (f"{REPO}:tiny", "2 files are called so; name one of them: BF16/tiny"),
        (f"{REPO}/other.gguf", "there is no such file; there is BF16/tiny"),
        (REPO, r"name one by how it is quantized, such as org/tiny-GGUF:BF16 \(there is BF16, Q8_0\)"),
    ],
)
def test_a_name_that_fits_no_file_or_several_is_answered_with_those_there_are(
    settings: HubSettings, name: str, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(name, hub=settings)


def test_a_gguf_file_is_no_adapter(settings: HubSettings) -> None:
    with (
        pytest.raises(AdapterError, match="names a GGUF file, which is no adapter"),
        open_directory(f"{REPO}:Q8_0", settings),
    ):
        pass
