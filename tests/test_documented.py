"""Every command, option and path of the API that the pages for readers name is there, and some test uses it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import click
import pytest
from starlette.routing import BaseRoute, Match, Route, WebSocketRoute

from peerd.api.app import Api
from peerd.api.metrics.endpoint import MetricsEndpoint
from peerd.api.models import Models
from peerd.api.openai.answering import Answering
from peerd.api.web.history import History
from peerd.api.web.invitations import InvitationsApi
from peerd.cli.main import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
ENDPOINT = re.compile(r"(?<![\w.~/{}-])/(?:v1|api|peerd/v1|metrics|readyz|healthz|health|tokenize|detokenize)[\w/{}-]*")


def snippets(page: Path) -> Iterator[str]:
    """The code on a page: lines of shells' blocks, continued ones joined, and code in prose."""
    text = page.read_text()
    for language, block in FENCE.findall(text):
        if language in ("sh", "console", ""):
            yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    yield from INLINE.findall(FENCE.sub("", text))


def commands(snippet: str) -> Iterator[list[str]]:
    """The words of each peerd that a line runs."""
    try:
        words = shlex.split(snippet, comments=True)
    except ValueError:
        return
    for at, word in enumerate(words):
        if word.rpartition("/")[2] == "peerd" and (at == 0 or words[at - 1] in ("$", "|", "exec", "&&", "-t")):
            yield list(until_the_next(words[at + 1 :]))


def until_the_next(words: list[str]) -> Iterator[str]:
    for word in words:
        if word in ("|", ">", "&&", ";", "&"):
            return
        yield word


def options_of(command: click.Command) -> set[str]:
    names = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return names | {"--help", "-h"}


def resolved(words: list[str]) -> tuple[str, click.Command | None, list[str]]:
    """The name of the command that a line runs, the command (None if there is none), and the words behind its name.

    Options of the daemon that stand before a command count among these words.
    """
    name, command, before = "peerd", cast(click.Command, cli), list[str]()
    flags = {opt for param in cli.params if isinstance(param, click.Option) and param.is_flag for opt in param.opts}
    rest = list(words)
    while rest and isinstance(command, click.Group):
        word = rest.pop(0)
        if word.startswith("-"):
            before += [word, *([] if word in flags else rest[:1])]
            rest = rest if word in flags else rest[1:]
        elif re.fullmatch(r"[a-z][a-z-]*", word):
            name = f"{name} {word}"
            if (found := command.commands.get(word)) is None:
                return name, None, rest
            assert {option for option in before if option.startswith("-")} <= options_of(command), words
            command, before = found, []
        else:
            before.append(word)
    return name, command, before + rest


@cache
def used_lines() -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Of all pages: the page, the command's whole name, and the options that stand behind it."""
    found = []
    for page in PAGES:
        for snippet in snippets(page):
            for words in commands(snippet):
                name, command, rest = resolved(words)
                assert command is not None, f"{page.name}: there is no command {name}"
                options = {option for word in rest for option in OPTION.findall(word.partition("=")[0])}
                assert options <= options_of(command), f"{page.name}: {name} has no {options - options_of(command)}"
                found.append((page.name, name, tuple(options)))
    return tuple(found)


@cache
def text_of_tests() -> str:
    own = Path(__file__)
    return "\n".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")) if path != own)


@cache
def documented_options() -> frozenset[str]:
    """All options that pages name: of peerd's commands, and alone in prose."""
    known = set().union(*(options_of(command) for command in all_commands()))
    prose = {
        option
        for page in PAGES
        for snippet in snippets(page)
        if snippet.startswith("--")
        for option in OPTION.findall(snippet.split()[0])
    }
    return frozenset((prose & known) | {option for _, _, options in used_lines() for option in options})


def all_commands(group: click.Command = cli) -> Iterator[click.Command]:
    yield group
    if isinstance(group, click.Group):
        for command in group.commands.values():
            yield from all_commands(command)


def test_every_command_line_on_a_page_is_one_that_peerd_takes() -> None:
    names = {name for _, name, _ in used_lines()}
    assert {"peerd", "peerd generate", "peerd join", "peerd keys new-swarm", "peerd config init"} <= names


def test_every_command_is_on_a_page() -> None:
    text = "\n".join(page.read_text() for page in [*PAGES, ROOT / "SECURITY.md"])
    assert [name for name in cli.commands if f"`peerd {name}" not in text and f"\npeerd {name}" not in text] == []


def test_every_option_that_a_page_names_is_used_by_a_test() -> None:
    text = text_of_tests()
    assert len(documented_options()) > 60
    unused = [one for one in documented_options() if f'{one}"' not in text and f"{one} " not in text]
    assert sorted(unused) == []


def test_every_command_that_a_page_names_is_run_by_a_test() -> None:
    names = {name.split()[-1] for _, name, _ in used_lines() if name != "peerd"}
    text = text_of_tests()
    assert sorted(name for name in names if f'"{name}"' not in text) == []


def routes() -> list[BaseRoute]:
    nothing = cast(Any, None)
    models = Models({})
    api = Api(models, nothing, nothing, nothing, History(), Answering())
    return api.app(*MetricsEndpoint(nothing).routes(), *InvitationsApi(nothing, models).routes()).routes


def documented_endpoints() -> set[str]:
    found = set()
    for page in [*PAGES, ROOT / "spec/local-api.md"]:
        code = "\n".join([*INLINE.findall(page.read_text()), *(block for _, block in FENCE.findall(page.read_text()))])
        found |= {path.rstrip("/") for path in ENDPOINT.findall(code)}
    return found


def answers(path: str, route: BaseRoute) -> bool:
    """Whether a route has the path, in which capitals and braces stand for anything."""
    concrete = re.sub(r"\{\w+\}|\b[A-Z]+\b", "x", path)
    kind = "websocket" if isinstance(route, WebSocketRoute) else "http"
    scope = {"type": kind, "path": concrete, "method": "GET", "headers": [], "root_path": ""}
    return route.matches(scope)[0] is not Match.NONE


# What pages name as the beginning of paths, or as the base URL of an API.
BASES = {"/v1", "/api", "/peerd/v1"}


def test_every_endpoint_that_a_page_names_is_served_and_called_by_a_test() -> None:
    served = routes()
    text = text_of_tests()
    named = documented_endpoints() - BASES
    assert len(named) > 15
    assert sorted(path for path in named if not any(answers(path, route) for route in served)) == []
    fixed = {path: re.split(r"/(?:\{|[A-Z]+\b)", path)[0] for path in named}
    assert sorted(path for path, beginning in fixed.items() if beginning not in text) == []


@pytest.mark.parametrize("route", routes(), ids=lambda route: cast(Route, route).path)
def test_every_endpoint_is_in_the_specification(route: Route) -> None:
    page = (ROOT / "spec/local-api.md").read_text() + (ROOT / "docs/api.md").read_text()
    path = re.sub(r"/\{.*", "", route.path)
    assert path in page or path in ("/favicon.ico", "/web")
