"""Reads which tools a chat offers to the model, and how it may call them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from peerd.api.fields import Fields

# OpenAI's own limit.
MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolFields:
    """The tools as templates take them: `{"type": "function", "function": {...}}`. `parallel`: more than one call may
    be made in an answer. `must_call`: the names of the tools of which one must be called; none if none must.
    """

    tools: list[dict[str, Any]]
    parallel: bool
    must_call: tuple[str, ...] = ()

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """The JSON schema of each tool's arguments, by the tool's name."""
        return {tool["function"]["name"]: tool["function"]["parameters"] for tool in self.tools}


def read_tools(fields: Fields) -> ToolFields | None:
    """The tools that the model may call. None if there are none. Raises ApiError."""
    offered, chosen = fields.take("tools"), fields.take("tool_choice")
    parallel = fields.boolean("parallel_tool_calls") or fields.take("parallel_tool_calls") is None
    if not offered or chosen == "none":
        _check_choice(fields, chosen, [])
        return None
    if not isinstance(offered, list) or len(offered) > MAX_TOOLS:
        raise fields.error("tools", f"must be a list of at most {MAX_TOOLS} tools")
    tools = [_tool(fields, f"tools[{number}]", tool) for number, tool in enumerate(offered)]
    names = [tool["function"]["name"] for tool in tools]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise fields.error(f"tools[{number}].function.name", "is the name of another tool as well")
    only = _check_choice(fields, chosen, names)
    # A certain function is called once.
    return ToolFields(tools, parallel and not isinstance(chosen, dict), only)


def _check_choice(fields: Fields, chosen: Any, names: list[str]) -> tuple[str, ...]:
    """The names of the tools of which one must be called; none if none must."""
    if chosen in (None, "none", "auto"):
        return ()
    if not names:
        raise fields.error("tool_choice", "needs tools", code="invalid_value")
    if chosen == "required":
        return tuple(names)
    if not isinstance(chosen, dict):
        raise fields.error("tool_choice", "must be none, auto, required or a function", code="invalid_value")
    choice = fields.group("tool_choice")
    assert choice is not None
    if choice.required_text("type") != "function":
        raise choice.error("type", "must be function", code="unsupported_parameter")
    function = choice.group("function")
    choice.refuse_others()
    if function is None or function.required_text("name") not in names:
        raise fields.error("tool_choice.function.name", "must be the name of one of the tools", code="invalid_value")
    return (function.required_text("name"),)


def refuse_functions(fields: Fields) -> None:
    """Refuse what came before tools. Functions that must not be called, and a choice among none, change nothing."""
    offered, chosen = fields.take("functions"), fields.take("function_call")
    if offered and chosen != "none":
        raise fields.error("functions", "are not supported here: send tools", code="unsupported_parameter")
    if chosen not in (None, "none", "auto"):
        raise fields.error("function_call", "is not supported here: send tools", code="unsupported_parameter")


def _tool(fields: Fields, path: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise fields.error(path, "must be an object")
    if value.get("type") != "function":
        raise fields.error(f"{path}.type", "must be function: other tools are not supported here")
    _refuse_others(fields, path, value, {"type", "function"})
    function = value.get("function")
    path = f"{path}.function"
    if not isinstance(function, dict):
        raise fields.error(path, "must be an object")
    _refuse_others(fields, path, function, {"name", "description", "parameters", "strict"})
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise fields.error(f"{path}.name", "must have 1 to 64 letters, digits, _, - and dots")
    if not isinstance(description, str | None):
        raise fields.error(f"{path}.description", "must be a string")
    parameters = function.get("parameters")
    if not isinstance(parameters, dict | None):
        raise fields.error(f"{path}.parameters", "must be a JSON schema, an object")
    if not isinstance(function.get("strict"), bool | None):
        raise fields.error(f"{path}.strict", "must be true or false")
    # Templates commonly read all three without looking whether they are there.
    schema = parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "description": description or "", "parameters": schema}}


def _refuse_others(fields: Fields, path: str, value: dict[str, Any], known: set[str]) -> None:
    for name in sorted(value.keys() - known):
        raise fields.error(f"{path}.{name}", "is not a known parameter", code="unknown_parameter")
