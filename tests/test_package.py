"""The wheel: what is in it, and that it lives beside an application whose modules have the rooms' names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROOMS = ("protocol", "routing", "compute")
# Of a folder itself, without its subfolders.
MAX_FILES = 16

APPLICATION = """
import importlib, pkgutil
import compute, protocol, routing
import peerd

assert (protocol.WHOSE, routing.WHOSE, compute.WHOSE) == ("application",) * 3
for module in pkgutil.walk_packages(peerd.__path__, "peerd."):
    if not module.name.endswith("__main__"):
        print(module.name, importlib.import_module(module.name).__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, unpacked as an installer would; built from a copy, for building writes into its source."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for room in ("peerd", *ROOMS):
        shutil.copytree(REPOSITORY / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("target")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), cwd=source)
    (wheel,) = (source / "dist").glob("peerd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_one_package_and_nothing_beside_it(installed: Path) -> None:
    assert sorted(path.name.split("-")[0] for path in installed.iterdir()) == ["peerd", "peerd"]
    assert (installed / "peerd/py.typed").exists()


def test_the_wheel_holds_the_daemon_s_page(installed: Path) -> None:
    page = "peerd/api/web/static"
    expected = {path.name for path in (REPOSITORY / page).iterdir()}
    assert "index.html" in expected
    assert {path.name for path in (installed / page).iterdir()} == expected


def test_no_folder_has_more_files_than_one_can_take_in() -> None:
    folders = ("peerd", *ROOMS, "tests", "benchmarks", "examples", "contrib", "docs", "spec")
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*") if is_source(path)]
    counts = Counter(path.parent.relative_to(REPOSITORY).as_posix() for path in files)
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


def is_source(path: Path) -> bool:
    made = {"__pycache__", "node_modules"}
    return path.is_file() and path.name != "__init__.py" and made.isdisjoint(path.parts)


def test_the_wheel_holds_every_module_of_the_four_rooms(installed: Path) -> None:
    expected = {Path("peerd") / path.relative_to(REPOSITORY / "peerd") for path in modules_in("peerd")}
    for room in ROOMS:
        expected |= {Path("peerd") / path.relative_to(REPOSITORY) for path in modules_in(room)}
    assert {path.relative_to(installed) for path in (installed / "peerd").rglob("*.py")} == expected


def modules_in(room: str) -> list[Path]:
    return list((REPOSITORY / room).rglob("*.py"))


def test_an_application_s_protocol_routing_and_compute_shadow_nothing(installed: Path, tmp_path: Path) -> None:
    for room in ROOMS:
        (tmp_path / f"{room}.py").write_text('WHOSE = "application"\n')
    (tmp_path / "main.py").write_text(APPLICATION)
    output = run(sys.executable, "main.py", cwd=tmp_path, PYTHONPATH=str(installed))
    imported = dict(line.split(" ", 1) for line in output.splitlines())
    assert {
        "peerd.protocol.errors",
        "peerd.routing.chains.chain",
        "peerd.compute.engine.engine",
        "peerd.cli.main",
    } <= imported.keys()
    assert all(Path(file).is_relative_to(installed) for file in imported.values())
