"""`peerd blocks`: what fits here, as a server would compute it, in words, in JSON and as the doctor's finding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type

from peerd.cli.commands import running
from peerd.cli.doctor.finding import Level
from peerd.cli.doctor.fitting import Fit, Fitting, fitting_of
from peerd.cli.doctor.show_blocks import as_text, block_findings, look_at_blocks
from peerd.cli.main import cli
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.protocol.span import Span
from peerd.spans import budget
from peerd.spans.budget import how_many_blocks, kv_tokens_of
from peerd.spans.spec import ServeSpec
from tests.compute.gguf_models import tiny_config, tiny_model
from tests.compute.gguf_writer import write_model

# Enough for connections and batches, and some blocks of the tiny model.
MEMORY = 320 * 2**20


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "packed_is_faster", lambda: False)
    monkeypatch.setattr(running, "set_up_logging", lambda _level: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_model(path, "llama", tiny_model(tiny_config("llama")), Type.Q4_1)
    return path


@pytest.fixture
def quantized(path: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(path) as checkpoint:
        yield checkpoint


def test_it_says_of_each_storage_what_a_server_with_it_would_hold(quantized: Checkpoint) -> None:
    spec = ServeSpec(memory_bytes=MEMORY)
    found = fitting_of(spec, quantized)
    assert [fit.quantize for fit in found.fits] == ["none", "int8", "nf4", "packed"]
    assert [fit.quantize for fit in found.fits if fit.is_default] == ["none"]
    for fit in found.fits:
        own = replace(spec, quantize=fit.quantize)
        assert fit.count == how_many_blocks(own, quantized) > 0
        assert fit.kv_tokens == kv_tokens_of(own, quantized, Span(0, fit.count))
        assert 0 < fit.block_bytes < fit.total_bytes <= MEMORY


def test_weights_that_are_not_packed_have_no_row_for_it(tmp_path: Path) -> None:
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path / "plain")
    with open_checkpoint(tmp_path / "plain") as checkpoint:
        found = fitting_of(ServeSpec(memory_bytes=MEMORY), checkpoint)
    assert [fit.quantize for fit in found.fits] == ["none", "int8", "nf4"]


def test_the_command_prints_a_table_and_for_programs_json(path: Path) -> None:
    asked = ["blocks", str(path), "--memory", str(MEMORY), "--dtype", "float32", "--kv-tokens", "64"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 0, result.stderr
    assert "computing in float32" in result.stdout
    assert "none (default)" in result.stdout
    (found,) = json.loads(CliRunner().invoke(cli, [*asked, "--device", "cpu", "--json"]).stdout)
    assert (found["given_bytes"], found["fits"][0]["kv_tokens"]) == (MEMORY, 64)


def test_too_little_memory_is_said_with_what_to_do(path: Path) -> None:
    result = CliRunner().invoke(cli, ["blocks", str(path), "--memory", "1MiB"])
    assert result.exit_code == 0
    assert "none: to serve one block of" in result.stdout
    assert "raise --memory" in result.stdout


def fit(quantize: str, count: int, *, is_default: bool = False) -> Fit:
    problem = "" if count else f"nothing fits as {quantize}"
    return Fit(quantize=quantize, is_default=is_default, count=count, block_bytes=2**20, kv_tokens=9, problem=problem)


def found(*fits: Fit) -> Fitting:
    return Fitting(
        model="big\x1b[31m",
        block_count=40,
        device="cpu",
        dtype="bfloat16",
        given_bytes=2**30,
        is_limited=False,
        fits=fits,
    )


@pytest.mark.parametrize(
    ("fits", "level", "words"),
    [
        ([fit("none", 40, is_default=True), fit("int8", 40)], Level.OK, "40 of 40 blocks"),
        ([fit("none", 3, is_default=True), fit("int8", 6)], Level.OK, "with KV for 9 positions; 6 as int8"),
        ([fit("none", 0, is_default=True), fit("int8", 6)], Level.WARNING, "no block of"),
        ([fit("none", 0, is_default=True), fit("int8", 0)], Level.ERROR, "nothing fits as none"),
    ],
    ids=["all", "some", "only quantized", "none"],
)  # fmt: skip
def test_the_doctor_says_whether_a_server_would_be_of_use(fits: list[Fit], level: Level, words: str) -> None:
    (one,) = block_findings(found(*fits))
    assert one.level is level
    assert words in one.said
    assert bool(one.fix) == (level is not Level.OK)


def test_only_what_helps_is_proposed() -> None:
    (one,) = block_findings(found(fit("none", 0, is_default=True), fit("int8", 2)))
    assert one.fix == "serve with --quantize int8"


def test_names_of_models_are_no_commands_to_a_terminal() -> None:
    assert "\x1b" not in as_text(found(fit("none", 3, is_default=True)))


@pytest.mark.real_time
async def test_a_model_that_cannot_be_served_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (one,) = await look_at_blocks(tmp_path)
    assert (one.level, one.what) == (Level.ERROR, "blocks")


@pytest.mark.real_time
async def test_the_doctor_looks_at_a_model_that_is_there(path: Path) -> None:
    (one,) = await look_at_blocks(path)
    assert one.level is Level.OK
