"""Reads the file and the environment into values for the options, and remembers where each came from.

The command line counts most, then the environment, then the file, then the option's default.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from peerd.cli.config.settings import Setting
from peerd.local.profile import default_config_file

# A file of all options with a thousand peers each would be smaller.
_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Given:
    """A value, as an option takes it, and its `source`: a variable or a file, for people."""

    value: Any
    source: str


@dataclass(frozen=True, slots=True)
class Config:
    """What the file and the environment say, by the names under which commands get their values."""

    path: Path
    exists: bool = False
    given: Mapping[str, Given] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """The values alone."""
        return {name: given.value for name, given in self.given.items()}


def read_config(
    ctx: click.Context,
    path: Path | None,
    known: Sequence[Setting],
    wanted: Sequence[Setting],
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """Read the values of the `wanted` settings. path: None takes the default one, which may be missing.

    known: what the file may contain. Raises click.UsageError, which names the place, the mistake and the fix.
    """
    chosen = path or default_config_file()
    raw = _read_file(chosen, must_exist=path is not None)
    by_key = {setting.key: setting for setting in known}
    if raw is not None:
        _refuse_unknown(chosen, raw, by_key)
    given: dict[str, Given] = {}
    for setting in wanted:
        if raw is not None and setting.key in raw:
            given[setting.name] = _of_file(ctx, chosen, setting, raw[setting.key])
        if text := environ.get(setting.variable):
            given[setting.name] = _of_environment(ctx, setting, text)
    return Config(chosen, raw is not None, given)


def _read_file(path: Path, *, must_exist: bool) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        if must_exist:
            raise click.UsageError(f"{path} does not exist: peerd config init {path} writes one") from None
        return None
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise click.UsageError(f"{path} has more than {_MAX_FILE_BYTES >> 20} MiB, so it is no configuration of peerd")
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # Also of text that is no UTF-8.
        raise click.UsageError(f"{path} is not TOML: {error}") from None


def _refuse_unknown(path: Path, raw: Mapping[str, Any], known: Mapping[str, Setting]) -> None:
    for key in raw:
        if key in known:
            continue
        if isinstance(raw[key], dict):
            raise click.UsageError(f"{path}: [{key}] begins a table, of which there are none: write its keys above it")
        # A flag as it is written on the command line, or an underscore, is a likely mistake.
        plain = key.lstrip("-").replace("_", "-").lower()
        near = [plain] if plain in known else difflib.get_close_matches(plain, known, 1)
        hint = f"did you mean {near[0]}?" if near else "peerd config lists all keys"
        raise click.UsageError(f"{path}: there is no key {key!r}: {hint}")


def _of_file(ctx: click.Context, path: Path, setting: Setting, raw: Any) -> Given:
    try:
        value = setting.from_file(raw)
        setting.check(ctx, value)
    except ValueError as error:
        raise click.UsageError(f"{path}: {setting.key}: {error}") from None
    except click.UsageError as error:
        raise click.UsageError(f"{path}: {setting.key}: {error.message}") from None
    return Given(value, str(path))


def _of_environment(ctx: click.Context, setting: Setting, text: str) -> Given:
    try:
        value = setting.from_environment(text)
        setting.check(ctx, value)
    except click.UsageError as error:
        raise click.UsageError(f"{setting.variable}: {error.message}") from None
    return Given(value, setting.variable)
