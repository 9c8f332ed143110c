"""The lock files in requirements/ agree with the ranges in pyproject.toml, and name everything that set-up installs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LOCKS = ("run.txt", "dev.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins_in(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def lock(name: str) -> list[Requirement]:
    return pins_in((ROOT / "requirements" / name).read_text())


def versions(pins: list[Requirement]) -> dict[str, set[Version]]:
    """By name. A package may have several: one for each Python."""
    found: dict[str, set[Version]] = {}
    for pin in pins:
        (exact,) = pin.specifier
        found.setdefault(canonicalize_name(pin.name), set()).add(Version(exact.version))
    return found


def group(name: str) -> Iterator[str]:
    for entry in PROJECT["dependency-groups"][name]:
        if isinstance(entry, str):
            yield entry
        else:
            yield from group(entry["include-group"])


def ranges(lock_name: str) -> list[Requirement]:
    lines: list[Any] = PROJECT["project"]["dependencies"]
    return [Requirement(line) for line in [*lines, *(group("dev") if lock_name == "dev.txt" else ())]]


def disagreements(pins: list[Requirement], wanted: list[Requirement]) -> list[str]:
    """What pyproject.toml asks for that the pins lack, or have outside its range."""
    found = versions(pins)
    return [
        f"{requirement}: {', '.join(map(str, sorted(have))) or 'not pinned'}"
        for requirement in wanted
        if not (have := found.get(canonicalize_name(requirement.name), set()))
        or not all(version in requirement.specifier for version in have)
    ]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_holds_a_version_in_range_of_all_that_pyproject_names(name: str) -> None:
    assert disagreements(lock(name), ranges(name)) == [], "run `make lock`"


def test_a_pin_outside_its_range_and_a_missing_one_are_noticed() -> None:
    wanted = [Requirement("trio>=0.27"), Requirement("click>=8.4.2")]
    assert disagreements(pins_in("# by hand\ntrio==0.35.0\nclick==8.5.1\n"), wanted) == []
    assert disagreements(pins_in("trio==0.26.2\n"), wanted) == ["trio>=0.27: 0.26.2", "click>=8.4.2: not pinned"]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_holds_exact_versions_and_nothing_of_one_machine(name: str) -> None:
    """No URLs, options, local paths or local builds: any index, and any build of torch that it has, will do."""
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        assert re.fullmatch(r"# .*|[a-z0-9-]+(==[0-9][0-9a-z.]*)( ; [^/@]+)?", line), line


@pytest.mark.parametrize("name", LOCKS)
def test_what_a_pinned_package_needs_is_pinned_too(name: str) -> None:
    pins = lock(name)
    found = versions(pins)
    needed = [
        Requirement(line)
        for package in distributions()
        if Version(package.version).public in map(str, found.get(canonicalize_name(package.metadata["Name"]), ()))
        for line in package.requires or ()
    ]
    assert needed, "nothing of the lock file is installed: the test would prove nothing"
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    # Without those parts of a package that only some of its users ask for.
    needed = [need for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    assert disagreements(here, needed) == []


def test_both_lock_files_pin_the_same_versions() -> None:
    run, dev = versions(lock("run.txt")), versions(lock("dev.txt"))
    assert run == {name: dev.get(name) for name in run}


def test_torch_stays_at_the_build_that_is_tested() -> None:
    assert versions(lock("dev.txt"))["torch"] == versions(lock("run.txt"))["torch"] == {Version("2.13.0")}
    assert not [name for name in versions(lock("dev.txt")) if name.startswith(("nvidia-", "cuda-"))]
