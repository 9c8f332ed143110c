"""What can be configured: the options of the daemon's command, which are the only table of them.

An option `--kv-tokens N` is the key `kv-tokens` of the file and the variable PEERD_KV_TOKENS. A value of either is text
or a number that the option itself parses and refuses, as if it had been given on the command line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

# What is said before any file is read, or is no property of a daemon.
_LEFT_OUT = frozenset({"config", "profile", "version", "help"})
# Options that other commands share with the daemon, which mean the same there.
SHARED = (
    "bootstrap",
    "swarm-key",
    "no-relay",
    "no-punch",
    "allow",
    "block",
    "trusted",
    "manifest",
    "disk",
    "socket",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One option, as it is called in a file (`key`) and in the environment (`variable`)."""

    option: click.Option

    @property
    def key(self) -> str:
        return max(self.option.opts, key=len).removeprefix("--")

    @property
    def variable(self) -> str:
        return f"PEERD_{self.key.upper().replace('-', '_')}"

    @property
    def name(self) -> str:
        """The name under which the command gets its value."""
        assert self.option.name is not None
        return self.option.name

    @property
    def is_flag(self) -> bool:
        return bool(self.option.is_flag)

    @property
    def is_list(self) -> bool:
        return self.option.multiple

    def from_file(self, value: Any) -> Any:
        """The value of a TOML file as the option takes it. Raises ValueError, with what is wrong, for another kind."""
        if self.is_flag:
            if not isinstance(value, bool):
                raise ValueError(f"{_shown(value)} is neither true nor false")
            return value
        if self.is_list:
            return [self._text(item) for item in (value if isinstance(value, list) else [value])]
        return self._text(value)

    def from_environment(self, text: str) -> Any:
        """The value of a variable as the option takes it. Several are split as click splits them: at spaces, and paths
        at colons. Raises click.BadParameter for a flag that is neither true nor false.
        """
        if self.is_flag:
            return click.BOOL.convert(text, self.option, None)
        return list(self.option.type.split_envvar_value(text)) if self.is_list else text

    def _text(self, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            kind = "texts" if self.is_list else "a text or a number"
            raise ValueError(f"{_shown(value)} is not {kind}")
        text = str(value)
        # A shell would have done that.
        return os.path.expanduser(text) if isinstance(self.option.type, click.Path) else text

    def check(self, ctx: click.Context, value: Any) -> None:
        """Have the option parse a value. Raises click.BadParameter."""
        self.option.type_cast_value(ctx, value)


def settings_of(command: click.Command) -> list[Setting]:
    """All settings of the daemon's command, in the order of its options."""
    return [
        Setting(param)
        for param in command.params
        if isinstance(param, click.Option) and not param.hidden and param.name not in _LEFT_OUT
    ]


def shared_with(command: click.Command, settings: Sequence[Setting], more: Sequence[str] = ()) -> list[Setting]:
    """The settings that another command has as options too."""
    own = {flag for param in command.params for flag in param.opts}
    return [each for each in settings if each.key in (*SHARED, *more) and f"--{each.key}" in own]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
