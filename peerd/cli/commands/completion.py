"""`peerd completion`: has a shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from peerd.cli.console import write

_HOW = {
    "bash": "peerd completion bash > ~/.local/share/bash-completion/completions/peerd",
    "zsh": 'peerd completion zsh > "${fpath[1]}/_peerd"',
    "fish": "peerd completion fish > ~/.config/fish/completions/peerd.fish",
}
_LINES = "\n".join(f"  {how}" for how in _HOW.values())


@click.command(epilog=f"\b\nOnce, for your shell, which reads it when it starts:\n{_LINES}")
@click.argument("shell", type=click.Choice(tuple(_HOW)))
@click.pass_context
def completion(ctx: click.Context, /, shell: str) -> None:
    """Print the script with which a shell completes commands, options and their values."""
    found = get_completion_class(shell)
    assert found is not None
    write(found(ctx.find_root().command, {}, "peerd", "_PEERD_COMPLETE").source())
