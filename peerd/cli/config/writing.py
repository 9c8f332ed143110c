"""Writes configuration as TOML: a commented file to begin with, and what is in force now."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from peerd.cli.config.reading import Config
from peerd.cli.config.settings import Setting
from peerd.protocol.errors import InvalidRequest

_WIDTH = 100
_HEAD = """\
# The configuration of a peerd daemon. Remove the # before what you want to set.
#
# An option on the command line counts more than the environment (PEERD_KV_TOKENS=4096), and that more than
# this file. `peerd config` shows what is in force, and where it comes from.
"""


def example(setting: Setting) -> str:
    """A line that sets it, to be changed."""
    option = setting.option
    if setting.is_flag:
        return f"{setting.key} = true"
    kind = option.type
    if isinstance(kind, click.Choice):
        value: Any = str(option.default if option.default in kind.choices else kind.choices[0])
    elif isinstance(kind, click.IntRange | click.FloatRange):
        value = kind.min if kind.min not in (None, 0) else 1
    else:
        value = option.metavar or setting.key.upper()
    return f"{setting.key} = {toml([value] if setting.is_list else value)}"


def commented(settings: Sequence[Setting], headings: Mapping[str, Sequence[str]], rest: str) -> str:
    """A file in which everything is explained, and nothing is set."""
    groups: dict[str, list[Setting]] = {heading: [] for heading in (*headings, rest)}
    heading_of = {name: heading for heading, names in headings.items() for name in names}
    for setting in settings:
        groups[heading_of.get(setting.name, rest)].append(setting)
    parts = [_HEAD]
    for heading, group in groups.items():
        parts.append(f"\n# ---- {heading} ----\n")
        for setting in group:
            parts.append(f"\n{_comment(setting.option.help or '')}\n# {example(setting)}\n")
    return "".join(parts)


def _comment(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), _WIDTH, initial_indent="## ", subsequent_indent="## ")


def in_force(settings: Sequence[Setting], config: Config) -> str:
    """Every setting with its value and where that came from, as TOML."""
    lines = [f"# {config.path}{'' if config.exists else ' (there is no such file)'}"]
    rows = []
    for setting in settings:
        given = config.given.get(setting.name)
        if given is None:
            default = _default_of(setting)
            rows.append((f"# {setting.key}" + ("" if default is None else f" = {toml(default)}"), "default"))
        else:
            rows.append((f"{setting.key} = {toml(given.value)}", given.source))
    width = min(_WIDTH // 2, max(len(left) for left, _ in rows))
    lines += [f"{left:<{width}}  # {source}" for left, source in rows]
    return "\n".join(lines)


def as_json(settings: Sequence[Setting], config: Config) -> str:
    """The same for programs. A value of null: nothing sets it, and `peerd --help` says what that means."""
    listed = []
    for setting in settings:
        given = config.given.get(setting.name)
        value, source = (_default_of(setting), "default") if given is None else (given.value, given.source)
        listed.append({"key": setting.key, "variable": setting.variable, "value": value, "from": source})
    return json.dumps({"file": str(config.path), "exists": config.exists, "settings": listed}, indent=2)


def _default_of(setting: Setting) -> Any:
    """The value that a setting has when nothing sets it. None where that is decided when the daemon starts."""
    default = setting.option.default
    # Click has a value of its own for "none".
    return default if isinstance(default, bool | int | float | str) else None


def toml(value: Any) -> str:
    """A value in TOML, whose texts in quotes are written like JSON's."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value)


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist yet. Raises InvalidRequest."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as file:
            file.write(text)
    except FileExistsError:
        raise InvalidRequest(f"{path} exists already, and is not overwritten: edit it, or name another file") from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from None
