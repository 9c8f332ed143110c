"""A copy of a span trains as the whole Transformers model does, and a snapshot brings it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.checkpoint.trained import BLOCKS, Description, base_of, block_digests, write_tensors
from peerd.compute.errors import CheckpointError, InvalidStepError, NonFiniteError
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.model.span_model import load_span
from peerd.compute.training.memory import PassMemory
from peerd.compute.training.snapshots import KEPT, Snapshots
from peerd.compute.training.span_trainer import Optimizer, SpanTrainer, whole_pass
from peerd.protocol.span import Span
from tests.compute.device_turns import device_turns
from tests.compute.tiny_families import tiny_model

SPAN = Span(2, 5)
ROWS = (9, 4, 9)
ROOM = 2**26


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family in ("llama", "mixtral", "bloom"):
        found[family] = tmp_path_factory.mktemp(family)
        tiny_model(FAMILIES[family]).save_pretrained(found[family])
    return found


@pytest.fixture
def llama(paths: dict[str, Path]) -> Path:
    return paths["llama"]


def trainer_of(path: Path, optimizer: Optimizer = "adamw", span: Span = SPAN) -> SpanTrainer:
    with open_checkpoint(path) as checkpoint:
        model = load_span(checkpoint, span, dtype=torch.float32)
    trainer = SpanTrainer(model, optimizer, 0.1, PassMemory(4 * ROOM))
    trainer.passes.measure()
    return trainer


def train(trainer: SpanTrainer, steps: range, *, rate: float = 1e-2, clip: float = 0.0) -> list[torch.Tensor]:
    """Steps with other inputs each; returns the outputs before each."""
    outputs = []
    for step in steps:
        hidden, grad = normal(sum(ROWS), trainer.model.hidden_size, seed=step), normal(22, 32, seed=100 + step)
        given, micros = whole_pass(trainer, ROWS, hidden)
        forward = trainer.passes.forward(given, micros, ROOM)
        device_turns([forward])
        assert forward.tape is not None
        device_turns([trainer.backward(forward.tape, grad), trainer.update(rate, clip)])
        outputs.append(forward.output)
    return outputs


class Reference:
    """The span's layers of the whole model, trained by torch."""

    def __init__(self, path: Path, optimizer: str) -> None:
        with open_checkpoint(path) as checkpoint:
            self.model = load_span(checkpoint, SPAN, dtype=torch.float32)
        parameters = [each.requires_grad_() for each in self.model.layers.parameters()]
        kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        self.optimizer = kinds[optimizer](parameters, lr=1e-2, weight_decay=0.1)

    def train(self, steps: range, clip: float = 0.0) -> list[torch.Tensor]:
        outputs = []
        for step in steps:
            hidden, grad = normal(22, 32, seed=step), normal(22, 32, seed=100 + step)
            rows = [self.model.forward_no_cache(row[None])[0] for row in torch.split(hidden, ROWS)]
            outputs.append(torch.cat(rows))
            outputs[-1].backward(grad)
            if clip:
                nn.utils.clip_grad_norm_(self.model.layers.parameters(), clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return outputs


# Biases of keys in bloom change no output. Their gradients are rounding alone, of which AdamW makes whole steps.
@pytest.mark.parametrize(
    ("family", "optimizer", "clip"),
    [("llama", "adamw", 0.0), ("llama", "sgd", 2.0), ("mixtral", "adamw", 2.0), ("bloom", "sgd", 0.0)],
)
def test_steps_equal_torchs_own(paths: dict[str, Path], family: str, optimizer: Optimizer, clip: float) -> None:
    path = paths[family]
    trainer, reference = trainer_of(path, optimizer), Reference(path, optimizer)
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    found, expected = train(trainer, range(3), clip=clip), reference.train(range(3), clip)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-3)
    assert trainer.step == 3
    own = trainer.tensors()
    for name, tensor in reference.model.layers.state_dict().items():
        index, _, rest = name.partition(".")
        ours = own[f"{trainer.model.family.layers}.{SPAN.start + int(index)}.{rest}"]
        torch.testing.assert_close(ours, tensor, rtol=1e-3, atol=1e-3)
    assert any(not torch.equal(before[name], tensor) for name, tensor in own.items())


def test_a_snapshot_continues_where_it_was_made(llama: Path, tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "snapshots")
    trainer = trainer_of(llama)
    train(trainer, range(2))
    saved, digests = snapshots.write(trainer)
    assert set(digests) == {2, 3, 4}
    expected = train(trainer, range(2, 4))
    again = trainer_of(llama)
    newest = snapshots.newest()
    assert newest == saved
    snapshots.load(newest, again)
    assert again.step == 2
    for ours, theirs in zip(train(again, range(2, 4)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_snapshots_go_back_and_old_ones_are_deleted(llama: Path, tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    trainer = trainer_of(llama, "sgd", Span(0, 1))
    for step in range(KEPT + 1):
        train(trainer, range(step, step + 1))
        snapshots.write(trainer)
    assert [each.step for each in snapshots.all()] == list(range(2, KEPT + 2))
    older = snapshots.newest(2)
    assert older is not None
    snapshots.load(older, trainer)
    train(trainer, range(50, 51))
    # A crash while a snapshot was written leaves a folder that is no snapshot, and that the next one removes.
    (tmp_path / "unfinished-1").mkdir()
    again, _ = snapshots.write(trainer)
    assert snapshots.newest() == again
    assert again.step == 3
    assert not (tmp_path / "unfinished-1").exists()


def test_a_snapshot_of_other_blocks_or_a_damaged_one_is_refused(llama: Path, tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    saved, _ = snapshots.write(trainer_of(llama, "sgd", Span(0, 1)))
    with pytest.raises(CheckpointError, match="a snapshot of other blocks"):
        snapshots.load(saved, trainer_of(llama, "sgd", Span(1, 2)))
    saved.blocks.write_bytes(saved.blocks.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        snapshots.load(saved, trainer_of(llama, "sgd", Span(0, 1)))


def test_what_is_not_finite_reaches_no_weight(llama: Path, tmp_path: Path) -> None:
    trainer = trainer_of(llama, "sgd", Span(0, 1))
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    given, micros = whole_pass(trainer, (4,), normal(4, 32, seed=1))
    forward = trainer.passes.forward(given, micros, ROOM)
    device_turns([forward])
    assert forward.tape is not None
    with pytest.raises(NonFiniteError):
        device_turns([trainer.backward(forward.tape, torch.full((4, 32), 1e38))])
    with pytest.raises(InvalidStepError, match="run a backward first"):
        device_turns([trainer.update(1e-2)])
    assert trainer.step == 0
    for name, tensor in trainer.tensors().items():
        assert torch.equal(tensor, before[name])
    next(iter(trainer.tensors().values())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="go back to a snapshot"):
        Snapshots(tmp_path).write(trainer)


@pytest.fixture
def trained(llama: Path, tmp_path: Path) -> tuple[Path, SpanTrainer]:
    """A trained model's folder."""
    trainer = trainer_of(llama)
    train(trainer, range(1))
    saved, digests = Snapshots(tmp_path / "snapshots").write(trainer)
    folder = tmp_path / "mine"
    with open_checkpoint(llama) as base:
        Description(base_of(base), base.model_digest, digests).write(folder)
    saved.blocks.rename(folder / BLOCKS)
    return folder, trainer


def test_a_trained_model_has_the_trained_blocks_and_the_bases_others(
    llama: Path, trained: tuple[Path, SpanTrainer]
) -> None:
    folder, trainer = trained
    with open_checkpoint(folder) as mine, open_checkpoint(llama) as base:
        assert mine.model_digest != base.model_digest
        assert mine.name == "mine"
        assert [mine.block_digest(block) == base.block_digest(block) for block in range(8)] == [
            block not in range(2, 5) for block in range(8)
        ]
        spans = [load_span(each, Span(0, 8), dtype=torch.float32) for each in (mine, base)]
        hidden = normal(1, 6, 32, seed=9)
        with torch.no_grad():
            before = spans[1].forward_no_cache(hidden)
            for index, layer in enumerate(trainer.model.layers):
                spans[1].layers[2 + index].load_state_dict(layer.state_dict())
            found, expected = (each.forward_no_cache(hidden) for each in spans)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, before)


def test_other_weights_than_the_description_names_are_refused(trained: tuple[Path, SpanTrainer]) -> None:
    folder, trainer = trained
    tensors = load_file(folder / BLOCKS)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    write_tensors(folder / BLOCKS, tensors)
    with open_checkpoint(folder) as mine:
        with pytest.raises(CheckpointError, match="weights of block 2 are not those"):
            mine.block_digest(2)
        assert mine.block_digest(3) == block_digests(folder / BLOCKS, trainer.model.family.layers)[3]


def test_a_description_alone_serves_clients_and_untrained_blocks(trained: tuple[Path, SpanTrainer]) -> None:
    folder, _ = trained
    (folder / BLOCKS).unlink()
    with open_checkpoint(folder) as mine:
        assert load_span(mine, Span(0, 2), dtype=torch.float32).span == Span(0, 2)
        with pytest.raises(CheckpointError, match="block 2 was trained, and its weights are only on the server"):
            load_span(mine, Span(1, 3), dtype=torch.float32)


def test_a_description_of_another_base_or_without_sense_is_refused(llama: Path, tmp_path: Path) -> None:
    Description(str(llama), bytes(32), {0: bytes(32)}).write(tmp_path)
    with pytest.raises(CheckpointError, match="trained from other weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "peerd-trained.json").write_text('{"base": "x", "base_digest": "00", "blocks": {}}')
    with pytest.raises(CheckpointError, match="digests have 32 bytes"):
        open_checkpoint(tmp_path)
