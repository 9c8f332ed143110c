"""`peerd completion`: the scripts, and what a shell gets from them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from peerd.cli.main import cli


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_of_the_shell(shell: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["completion", shell], prog_name="peerd")
    assert result.exit_code == 0
    assert "_PEERD_COMPLETE" in result.stdout
    if (program := shutil.which(shell)) is not None:
        script = tmp_path / "script"
        script.write_text(result.stdout)
        assert subprocess.run([program, "-n", str(script)], capture_output=True, text=True, check=False).stderr == ""


def test_another_shell_is_refused_with_those_that_there_are() -> None:
    result = CliRunner().invoke(cli, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert "'bash', 'zsh', 'fish'" in result.stderr


def complete(*words: str, config: str = os.devnull) -> list[str]:
    environment = {
        "_PEERD_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["peerd", *words]),
        "COMP_CWORD": str(len(words)),
        "PEERD_CONFIG": config,
    }
    done = subprocess.run(
        [sys.executable, "-m", "peerd"], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.processes
def test_a_shell_gets_commands_options_and_values(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("nonsense")
    assert {"chat", "config", "calibrate"} >= set(complete("c", config=str(broken))) - {"completion"}
    assert "--kv-tokens" in complete("--k")
    assert complete("--quantize", "n") == ["none", "nf4"]
    assert complete("service", "un") == ["uninstall"]
