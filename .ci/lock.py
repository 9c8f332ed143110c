"""Resolves what peerd is installed with: the lock files, and the two ends of the ranges in pyproject.toml.

    lock      writes requirements/run.txt (what peerd needs) and requirements/dev.txt (with what tests and lint need)
    oldest    prints pins of the oldest releases that the ranges allow; fails where a lower bound cannot be installed
    newest    prints pins of the newest releases that the index has

uv resolves, for every platform and Python at once. torch stays what `TORCH` below says: any other build of it would
bring gigabytes of CUDA libraries, and only this one was tested. Run it with the Python that uv is installed for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "requirements"
# The CPU build's own requirements. The index's metadata are those of the CUDA build, which has the same version.
TORCH = "2.13.0"
TORCH_NEEDS = [
    "filelock",
    "fsspec>=0.8.5",
    "jinja2",
    "networkx>=2.5.1",
    "setuptools>=77.0.3",
    "sympy>=1.13.3",
    "typing-extensions>=4.10.0",
]
HEADER = "# Written by `make lock`. Do not edit: change the ranges in pyproject.toml and run it again.\n"

# Pins by line: `name==version`, and for which Pythons or platforms.
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)", re.MULTILINE)


def resolve(*options: str, constraints: str = "") -> str:
    """What uv makes of pyproject.toml with these options: a pin a line."""
    with tempfile.TemporaryDirectory() as folder:
        project, limits = Path(folder, "pyproject.toml"), Path(folder, "constraints.txt")
        metadata = (
            f'\n[[tool.uv.dependency-metadata]]\nname = "torch"\nversion = "{TORCH}"\nrequires-dist = {TORCH_NEEDS}\n'
        )
        project.write_text((ROOT / "pyproject.toml").read_text() + metadata)
        limits.write_text(f"torch=={TORCH}\n{constraints}")
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal"]
        command += ["--no-header", "--no-annotate", "--constraints", str(limits), *options, "pyproject.toml"]
        # In the folder: uv reads a project's settings where it is started.
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def lock() -> None:
    """Write the lock files. Everything in run.txt has the same version in dev.txt."""
    FOLDER.mkdir(exist_ok=True)
    everything = resolve("--group", "dev")
    (FOLDER / "dev.txt").write_text(HEADER + everything)
    (FOLDER / "run.txt").write_text(HEADER + resolve(constraints=everything))


def oldest() -> str:
    """The oldest releases of what pyproject.toml names, and of all else the newest that suit them."""
    direct = _direct()
    lowest = dict(_PIN.findall(resolve("--resolution", "lowest-direct")))
    wrong = [
        f"{name}>={bound} in pyproject.toml is not true: the oldest that can be installed is {lowest[name]}"
        for name, bound in direct.items()
        if name != "torch" and not _same(lowest[name], bound)
    ]
    if wrong:
        sys.exit("\n".join(wrong))
    return resolve("--group", "test", constraints="".join(f"{name}=={lowest[name]}\n" for name in direct))


def _direct() -> dict[str, str]:
    """The lower bound of each of the project's own dependencies, by name."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = [re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?>=([^,;]+)", line) for line in lines]
    return {match[1].lower().replace("_", "-"): match[2] for match in found if match}


def _same(version: str, bound: str) -> bool:
    """Whether a version is a bound, which may leave out zeros at its end."""
    numbers, wanted = version.split("."), bound.split(".")
    return numbers[: len(wanted)] == wanted and set(numbers[len(wanted) :]) <= {"0"}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["lock"]:
            lock()
        case ["oldest"]:
            print(oldest(), end="")
        case ["newest"]:
            print(resolve("--group", "test"), end="")
        case _:
            sys.exit(__doc__)
