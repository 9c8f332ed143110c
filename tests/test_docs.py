"""What the pages for readers name exists: files, functions, commands, options, links, and arrows between rooms."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

import peerd

REPOSITORY = Path(__file__).parents[1]
# Which test holds each finding of the security review.
FINDINGS = "benchmarks/results/2026-12-01-findings.md"
PAGES = sorted(
    path
    for path in [*(REPOSITORY / "docs").glob("*.md"), *REPOSITORY.glob("*.md"), REPOSITORY / FINDINGS]
    if path.name != "CHANGELOG.md"  # what it names was there in its time
)
FOLDERS = ("peerd", "protocol", "routing", "compute", "tests", "benchmarks", "spec", "docs", "examples", r"\.ci")
CODE = re.compile(r"`([^`\n]+)`")
A_PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*")
A_SYMBOL = re.compile(r"([\w/]+\.py)::([\w.]+)")
A_LINK = re.compile(r"\]\(([^)\s]+)\)")
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def body_of(path: Path) -> Sequence[ast.stmt]:
    return ast.parse(path.read_text()).body


def defines(path: Path, name: str) -> bool:
    body = body_of(path)
    for part in name.split("."):
        found = next((node for node in body if isinstance(node, DEFINITIONS) and node.name == part), None)
        if found is None:
            return False
        body = found.body
    return True


def code_in(page: Path) -> Iterator[str]:
    for found in CODE.finditer(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        yield found[1]


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_functions_that_a_page_names_exist(page: Path) -> None:
    missing = []
    for code in code_in(page):
        symbol = A_SYMBOL.fullmatch(code)
        if symbol is not None:
            path = REPOSITORY / symbol[1]
            if not (path.is_file() and defines(path, symbol[2])):
                missing.append(code)
        elif A_PATH.fullmatch(code) and not (REPOSITORY / code).exists():
            missing.append(code)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_on_a_page_can_be_read(page: Path) -> None:
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        compile(block, f"{page.name}, block {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_peerd_in_python_on_a_page_exist(page: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    code += "\n".join(code_in(page))
    assert [name for name in set(re.findall(r"\bpeerd\.([A-Z]\w+)", code)) if name not in peerd.__all__] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    # `layers[3:7](hidden)` is code, and no link.
    text = re.sub(r"```.*?```|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL)
    links = [link.split("#")[0] for link in A_LINK.findall(text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_that_a_page_names_exist(page: Path) -> None:
    lines = re.findall(r"^([a-z][\w -]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    rules = {rule for line in lines for rule in line.split()}
    benchmarks = {re.sub(r"_(bench|sim)$", "", path.stem) for path in (REPOSITORY / "benchmarks").rglob("*.py")}
    named = {found for code in code_in(page) for found in re.findall(r"\bmake ([a-z][a-z_-]*[a-z])\b", code)}
    assert {name for name in named if name not in rules and name.removeprefix("bench-") not in benchmarks} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_of_peerd_that_a_page_names_exist(page: Path) -> None:
    defined = set()
    for path in (REPOSITORY / "peerd/cli").rglob("*.py"):
        defined |= set(re.findall(r"[\"/](--[a-z][\w-]*)", path.read_text()))
    defined |= {"--help", "--version"}
    named = set()
    for line in page.read_text().splitlines():
        for command in re.findall(r"(?:^|`)(?:\.venv/bin/)?(peerd(?: [^`#]*)?)", line):
            named |= set(re.findall(r"--[a-z][\w-]*", command))
        # The page for users of Petals names Petals' options as well.
        if page.stem != "from-petals":
            named |= {found for code in CODE.findall(line) for found in re.findall(r"^(--[a-z][\w-]*)", code)}
    assert named <= defined


# Of the picture in architecture.md: what a node stands for.
ROOM_OF = {"peer": "peerd/peer.py", "compute": "compute/", "routing": "routing/", "protocol": "protocol/"}


def node_of(module: str, nodes: Sequence[str]) -> str | None:
    for node in nodes:
        if module.startswith(ROOM_OF.get(node, f"peerd/{node}/")):
            return node
    return None


def imports_between(nodes: Sequence[str]) -> set[tuple[str, str]]:
    """Which node of the picture imports which, also for type checkers."""
    found = set()
    for room in ("peerd", "protocol", "routing", "compute"):
        for path in (REPOSITORY / room).rglob("*.py"):
            source = node_of(str(path.relative_to(REPOSITORY)), nodes)
            for statement in ast.walk(ast.parse(path.read_text())):
                if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("peerd."):
                    module = (statement.module or "").replace(".", "/")
                    own = module.split("/")[1] in ("protocol", "routing", "compute")
                    target = node_of(f"{module.removeprefix('peerd/') if own else module}.py", nodes)
                    if source is not None and target is not None and source != target:
                        found.add((source, target))
    return found


def reachable(start: str, arrows: set[tuple[str, str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        here = waiting.pop()
        for source, target in arrows:
            if source == here and target not in found:
                found.add(target)
                waiting.append(target)
    return found


def drawn() -> tuple[list[str], set[tuple[str, str]]]:
    picture = (REPOSITORY / "docs/architecture.md").read_text().split("```mermaid")[1].split("```")[0]
    nodes = re.findall(r"^\s*(\w+)\[\"", picture, re.MULTILINE)
    arrows = set()
    for line in re.findall(r"^\s*(\w+ (?:--|-\.).*)$", picture, re.MULTILINE):
        chain = re.split(r"\s*(?:-->|-\..*?\.->)\s*", line)
        arrows |= set(itertools.pairwise(chain))
    return nodes, arrows


def test_the_picture_shows_every_import_between_rooms_and_no_other() -> None:
    nodes, arrows = drawn()
    imports = imports_between(nodes)
    assert arrows <= imports
    assert {pair for pair in imports if pair[1] not in reachable(pair[0], arrows)} == set()


def test_no_way_through_the_picture_leads_back() -> None:
    nodes, arrows = drawn()
    assert [node for node in nodes if node in reachable(node, arrows)] == []


ROOMS = ("peerd", "compute", "routing", "protocol")


def test_files_that_prose_names_exist() -> None:
    folders = [REPOSITORY / room for room in (*ROOMS, "tests", "benchmarks", "examples")]
    there = [f"/{path.relative_to(REPOSITORY).as_posix()}" for folder in folders for path in folder.rglob("*.py")]
    named = {
        (path.relative_to(REPOSITORY).as_posix(), name)
        for room in (*ROOMS, "docs", "spec")
        for path in (REPOSITORY / room).rglob("*.*")
        if path.suffix in (".py", ".md")
        for name in re.findall(r"`((?:\w+/)*\w+\.py)`", path.read_text())
    }
    assert named
    missing = {(where, name) for where, name in named if not any(file.endswith(f"/{name}") for file in there)}
    assert missing == set()


def test_pages_of_the_specification_that_code_names_exist() -> None:
    named = {
        (path.relative_to(REPOSITORY).as_posix(), page)
        for folder in (*ROOMS, "tests", "benchmarks", "examples", "docs")
        for path in (REPOSITORY / folder).rglob("*.*")
        if path.suffix in (".py", ".md")
        for page in re.findall(r"\bspec/[a-z/-]+\.md", path.read_text())
    }
    assert named
    assert {(where, page) for where, page in named if not (REPOSITORY / page).exists()} == set()
