"""The specification names the code that follows it, and the versions that the code speaks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROOMS = ("protocol", "routing", "compute", "peerd")
SPEC = REPOSITORY / "spec"
PAGES = sorted(path for path in SPEC.rglob("*.md") if path.name != "README.md")
# Names that two peers must agree on: of streams, signatures, keys and hashes.
VERSIONED = re.compile(r"/peerd/[a-z]+/\d+|/peerd/v\d+/\w+|peerd( \w+)?[ ./]\d+\n?|Noise_\w+|noise-libp2p-static-key:")
# These pass messages on without reading what is in them: they wire, translate, or misuse them on purpose.
PASSES_ON = ("peerd/peer.py", "peerd/api/", "peerd/local/", "peerd/testing/", "peerd/cli/")
# Every protocol has refusals, and callers of a session say what they want: neither tells whose messages a module reads.
SHARED = {"Failure", "Want"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            yield str(path.relative_to(REPOSITORY)), ast.parse(path.read_text())


def versioned_names(tree: ast.Module) -> set[str]:
    literals = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    texts = (value.decode("latin1") if isinstance(value, bytes) else value for value in literals)
    return {text.rstrip("\n") for text in texts if isinstance(text, str) and VERSIONED.fullmatch(text)}


def code_of(page: Path) -> list[str]:
    row = re.search(r"^\| Code \| (.*) \|$", page.read_text(), re.MULTILINE)
    assert row is not None, f"spec/{page.name} has no row of its code"
    return re.findall(r"`([\w./]+)`", row[1])


def is_covered(module: str, named: list[str]) -> bool:
    return any(module == name or (name.endswith("/") and module.startswith(name)) for name in named)


def messages_read(tree: ast.Module) -> set[str]:
    """The files of messages whose classes a module imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peerd.protocol.messages."):
            classes = {alias.name for alias in node.names if not alias.name.isupper() and alias.name[0].isupper()}
            if classes - SHARED:
                found.add(f"{(node.module or '').removeprefix('peerd.').replace('.', '/')}.py")
    return found


def test_the_table_of_versions_has_exactly_the_names_that_the_code_speaks() -> None:
    table = (REPOSITORY / "spec/README.md").read_text().split("## Versions")[1]
    written = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(written) == len(set(written))
    spoken = set().union(*(versioned_names(tree) for name, tree in modules() if not name.startswith("peerd/testing/")))
    assert set(written) == spoken


def test_every_page_is_listed() -> None:
    listed = re.findall(r"\]\(([a-z/-]+\.md)\)", (SPEC / "README.md").read_text().split("## Versions")[0])
    assert sorted(listed) == sorted(page.relative_to(SPEC).as_posix() for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_that_a_page_names_exists(page: Path) -> None:
    for name in code_of(page):
        path = REPOSITORY / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), f"spec/{page.name} names {name}"


def test_every_module_of_protocol_belongs_to_a_page() -> None:
    named = [name for page in PAGES for name in code_of(page)]
    modules_there = {name for name, _ in modules() if name.startswith("protocol/") and not name.endswith("__init__.py")}
    assert {module for module in modules_there if not is_covered(module, named)} == set()


def test_whatever_reads_a_page_s_messages_is_named_there() -> None:
    code = {page.name: code_of(page) for page in PAGES}
    for module, tree in modules():
        if module.startswith(("protocol/", *PASSES_ON)):
            continue
        for messages in messages_read(tree):
            pages = {name: named for name, named in code.items() if messages in named}
            assert any(is_covered(module, named) for named in pages.values()), f"{module} reads {messages}: {[*pages]}"
