"""Reads the messages of a chat: roles, texts, tool calls and what tools answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peerd.api.fields import Fields
from peerd.api.strict_json import BadJson, decode_json

_MAX_MESSAGES = 4096
_MAX_CALLS = 128
_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The messages, each with `role` and `content`, an assistant's perhaps with `tool_calls` (their functions have
    `arguments`, a JSON text, and `values`, which it stands for), and a tool's with `tool_call_id` and `name`; an
    assistant's thoughts are in `reasoning_content`. `content` is None only beside tool calls. Raises ApiError.
    """
    value = fields.take("messages")
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_MESSAGES:
        raise fields.error("messages", f"must be a list of 1 to {_MAX_MESSAGES} messages")
    # The names of the functions that were called so far, by the calls' ids.
    called: dict[str, str] = {}
    return [_message(fields, f"messages[{number}]", message, called) for number, message in enumerate(value)]


def _message(fields: Fields, path: str, value: object, called: dict[str, str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise fields.error(path, "must be an object")
    role = value.get("role")
    if role not in _ROLES:
        raise fields.error(f"{path}.role", f"must be one of {', '.join(_ROLES)}")
    if value.get("function_call"):
        raise fields.error(f"{path}.function_call", "is not supported here: send tool_calls")
    calls = _calls(fields, f"{path}.tool_calls", value.get("tool_calls"))
    if calls and role != "assistant":
        raise fields.error(f"{path}.tool_calls", "is for messages of the role assistant")
    called.update((call["id"], call["function"]["name"]) for call in calls)
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    message["content"] = None if calls and value.get("content") is None else _content(fields, path, value)
    if isinstance(value.get("name"), str):
        message["name"] = value["name"]
    thought = value.get("reasoning_content") or value.get("reasoning")
    if role == "assistant" and isinstance(thought, str):
        # Most templates show it only while the model works with tools.
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message = _tool_ids(fields, path, value, called) | message
    return message


def _tool_ids(fields: Fields, path: str, value: dict[str, Any], called: dict[str, str]) -> dict[str, Any]:
    """Which call a tool answers. Templates may show the function's name, which OpenAI's API leaves out."""
    call_id = value.get("tool_call_id")
    if not isinstance(call_id, str) or not call_id:
        raise fields.error(f"{path}.tool_call_id", "must be the id of the call that the tool answers")
    if call_id not in called:
        raise fields.error(f"{path}.tool_call_id", "is the id of no tool call in the messages before it")
    return {"tool_call_id": call_id, "name": called[call_id]}


def _calls(fields: Fields, path: str, value: object) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > _MAX_CALLS:
        raise fields.error(path, f"must be a list of at most {_MAX_CALLS} calls")
    return [_call(fields, f"{path}[{number}]", call) for number, call in enumerate(value)]


def _call(fields: Fields, path: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise fields.error(path, "must be an object")
    if not isinstance(value.get("id"), str) or not value["id"]:
        raise fields.error(f"{path}.id", "must be a string, and not empty")
    function = value.get("function")
    if value.get("type", "function") != "function" or not isinstance(function, dict):
        raise fields.error(f"{path}.function", "must be an object, in a call of type function")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise fields.error(f"{path}.function.name", "must be a string, and not empty")
    text, values = _arguments(fields, f"{path}.function.arguments", function.get("arguments"))
    written = {"name": function["name"], "arguments": text, "values": values}
    return {"id": value["id"], "type": "function", "function": written}


def _arguments(fields: Fields, path: str, text: object) -> tuple[str, dict[str, Any]]:
    """A call's arguments as they were written, and what that stands for."""
    if not isinstance(text, str):
        raise fields.error(path, "must be a string that is a JSON object")
    # Some programs send an empty text for a call without arguments.
    text = text.strip() or "{}"
    try:
        values = decode_json(text)
    except BadJson as error:
        raise fields.error(path, f"must be a string that is a JSON object: it {error}") from None
    if not isinstance(values, dict):
        raise fields.error(path, "must be a string that is a JSON object")
    return text, values


def _content(fields: Fields, path: str, value: dict[str, Any]) -> str:
    content = value.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(_is_text_part(part) for part in content):
        return "".join(part["text"] for part in content)
    raise fields.error(f"{path}.content", "must be a string, or parts of type text: this API takes text only")


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
