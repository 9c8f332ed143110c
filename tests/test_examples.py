"""The examples run as they stand; those that train are shortened, and share one swarm."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"), key=lambda path: path.name)
LONGEST = 80
on_the_swarm = [
    pytest.mark.processes,
    pytest.mark.model,
    pytest.mark.real_time,
    pytest.mark.slow,
    # Of Transformers, peft and TRL among themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.mark.processes
@pytest.mark.model
@pytest.mark.real_time
def test_a_trio_program_can_hold_a_swarm_and_ask_it() -> None:
    result = subprocess.run(
        [sys.executable, EXAMPLES / "embed_in_trio.py", "What is the capital of France?"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "Paris" in result.stdout
    assert "blocks 0:15 on 12D3KooW" in result.stdout
    assert "blocks 15:30 on 12D3KooW" in result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_fits_on_two_screens(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= LONGEST


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A peer of the swarm that the examples start where they are given none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        with importlib.import_module("demo_swarm").demo_swarm() as (_, address):
            yield address


Run = Callable[..., list[str]]


@pytest.fixture
def run(address: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example's `main` on that swarm; gives the lines that it prints."""

    def run_it(name: str, *arguments: str) -> list[str]:
        runpy.run_path(str(EXAMPLES / name))["main"](["--bootstrap", address, *arguments])
        return capsys.readouterr().out.splitlines()

    return run_it


class TestOnTheSwarm:
    pytestmark = on_the_swarm

    def test_prompt_tuning_changes_what_it_trains_at_every_step(self, run: Run) -> None:
        *steps, result = run("prompt_tuning.py", "--steps", "3")
        losses = [float(line.split()[-1]) for line in steps]
        assert len(set(losses)) == 3
        assert losses[0] == pytest.approx(0.68, abs=0.02)
        assert re.fullmatch(r"right on new texts: \d+%", result)

    def test_a_linear_probe_looks_before_every_block_and_after_the_last(self, run: Run) -> None:
        lines = run("linear_probe.py", "--texts", "16")
        assert [int(line.split(":")[0].split()[-1]) for line in lines] == list(range(31))
        shares = [int(line.split("%")[0].split()[-1]) for line in lines]
        # The last word's embedding is the same in a question and its statement; blocks mix in the words before it.
        assert shares[0] <= 50 < max(shares)

    def test_paths_through_blocks_differ_and_the_models_own_is_the_best(self, run: Run) -> None:
        perplexities = {line[:18].strip(): float(line.split()[-1]) for line in run("custom_path.py")}
        assert len(perplexities) == len(set(perplexities.values())) == 5
        assert min(perplexities, key=lambda name: perplexities[name]) == "all blocks"
        assert perplexities["all blocks"] == pytest.approx(15.2, abs=0.2)

    @pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed: make test-trl")
    def test_a_persona_is_trained_and_saved_in_pefts_format(self, run: Run, tmp_path: Path) -> None:
        lines = run("persona_lora.py", "--steps", "2", "--output", str(tmp_path))
        assert [line.split(":")[0] for line in lines if line.startswith(("before", "after"))] == ["before", "after"]
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}

    def test_the_notebook_runs_from_its_first_cell_to_its_last(
        self, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        helper = importlib.import_module("demo_swarm")
        monkeypatch.setattr(helper, "demo_swarm", functools.partial(helper.demo_swarm, address))
        cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        names: dict[str, object] = {}
        for source in sources:
            exec(compile(source, "quickstart.ipynb", "exec"), names)
        assert "loss.backward()\noptimizer.step()" in sources[-2]
        said = capsys.readouterr().out.splitlines()
        assert "Paris" in said[0]
        assert said[1].startswith("torch.Size([1, ")
        assert said[2].startswith("A cat sat")
