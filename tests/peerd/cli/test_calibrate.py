"""`peerd calibrate`, and the option that takes what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from click.testing import CliRunner, Result

from peerd.cli import daemon as cli_serve
from peerd.cli.daemon import Daemon
from peerd.cli.main import cli
from peerd.compute.audits.thresholds import Numerics, Thresholds

pytestmark = pytest.mark.slow

ADDRESS = "/ip4/127.0.0.1/tcp/31330/ws/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)), prog_name="peerd")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        vocab_size=257,
        max_position_embeddings=128,
    )
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


def test_what_it_prints_is_taken_by_the_option(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, table = tmp_path / "text", tmp_path / "table.json"
    text.write_text("".join(f"The {number}th line of a text. " for number in range(40)))
    made = run("calibrate", model, text)
    assert made.exit_code == 0, made.output
    table.write_text(made.stdout)
    full, half = Numerics("float32", "none"), Numerics("bfloat16", "none")
    limit = Thresholds.from_json(made.stdout).limit([(full, half)], is_whole=True)
    assert limit is not None
    assert 0 < limit < 0.5
    started: list[Daemon] = []

    async def note(daemon: Daemon) -> None:
        await trio.lowlevel.checkpoint()
        started.append(daemon)

    monkeypatch.setattr(cli_serve, "run_daemon", note)
    result = run("--client", "--model", model, "--bootstrap", ADDRESS, "--audit", "1/7", "--audit-limits", table)
    assert result.exit_code == 0, result.output
    assert started[0].config.audit.probability == pytest.approx(1 / 7)
    assert started[0].config.audit.thresholds == Thresholds.from_json(made.stdout)


@pytest.mark.parametrize(
    ("content", "message"),
    [("short", "calibration needs 576"), (b"\xff\xfe", "cannot be read as UTF-8 text")],
)
def test_a_text_that_is_none_or_too_short_is_refused_in_one_line(
    model: Path, tmp_path: Path, content: str | bytes, message: str
) -> None:
    text = tmp_path / "text"
    text.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run("calibrate", model, text)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"peerd_thresholds": 1, "whole": {}, "part": {}, "made": 3}'])
def test_another_file_than_a_table_is_refused_in_one_line(model: Path, tmp_path: Path, content: str) -> None:
    table = tmp_path / "table.json"
    table.write_text(content)
    result = run("--client", "--model", model, "--bootstrap", ADDRESS, "--audit-limits", table)
    assert result.exit_code == 2
    assert "cannot be used for --audit-limits, peerd calibrate makes it" in result.stderr
