"""What the user may type beside text: lines that begin with a slash."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from peerd.protocol.errors import InvalidRequest

#: Each command, what it takes, and what it does.
COMMANDS = {
    "help": ("", "show this list"),
    "model": ("[NAME]", "talk to another model of the daemon; without NAME: list them"),
    "system": ("[TEXT]", "set the system prompt; without TEXT: show it; - for none"),
    "set": ("[NAME [VALUE]]", "change a setting such as temperature; without VALUE: as the model has it"),
    "retry": ("", "ask the last question again"),
    "clear": ("", "forget what was said"),
    "save": ("FILE", "write the conversation as JSON"),
    "swarm": ("", "show the peers, and which of them computed the last answer"),
    "quit": ("", "leave; so do Ctrl-D, and Ctrl-C twice"),
}
_NEED = frozenset({"save"})
_ALSO = {"exit": "quit", "bye": "quit", "new": "clear", "?": "help"}


@dataclass(frozen=True, slots=True)
class Command:
    """A command of `COMMANDS`, with what follows it on the line."""

    name: str
    argument: str = ""


def parse(text: str) -> Command | str:
    """A command, or text for the model. A text may begin with two slashes, of which it keeps one.

    Raises InvalidRequest for a command that there is not, and for what it lacks or does not take.
    """
    if not text.startswith("/"):
        return text
    if text.startswith("//"):
        return text[1:]
    word, _, argument = text[1:].partition(" ")
    name, argument = _ALSO.get(word, word), argument.strip()
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists all; a text that begins with / is written with //"
        raise InvalidRequest(f"there is no command /{word}: {hint}")
    takes = COMMANDS[name][0]
    if argument and not takes:
        raise InvalidRequest(f"/{name} takes nothing after it")
    if not argument and name in _NEED:
        raise InvalidRequest(f"/{name} needs {takes}")
    return Command(name, argument)


def help_text() -> str:
    """The list of all commands."""
    left = [f"/{name} {takes}".rstrip() for name, (takes, _) in COMMANDS.items()]
    width = max(map(len, left))
    lines = [f"{use:<{width}}  {does}" for use, (_, does) in zip(left, COMMANDS.values(), strict=True)]
    return "\n".join([*lines, "Esc and then Enter begins a new line; a line that ends with \\ goes on in the next."])
