"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.processes
@pytest.mark.model
@pytest.mark.real_time
def test_a_trio_program_can_hold_a_swarm_and_ask_it() -> None:
    result = subprocess.run(
        [sys.executable, EXAMPLES / "embed_in_trio.py", "What is the capital of France?"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "Paris" in result.stdout
    assert "blocks 0:15 on 12D3KooW" in result.stdout
    assert "blocks 15:30 on 12D3KooW" in result.stdout
