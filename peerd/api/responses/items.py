"""Turns the items of a request's input into messages of chats.

A message, each call and what each tool answered are items of their own, and so is reasoning; in a chat, calls belong to
the message of the assistant before them, and reasoning to the one after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peerd.api.fields import Fields
from peerd.api.translation import Translation

_MAX_ITEMS = 4096
_MAX_PARTS = 4096
# What a program sends back of the items that it was given.
_OF_ANSWERS = ("id", "status", "phase", "caller", "namespace")


def add_input(fields: Fields, translation: Translation, item_of: Callable[[str], dict[str, Any] | None]) -> None:
    """Translate `input`, and add it to the messages. `item_of` finds an item of an earlier response by its id.

    Raises ApiError.
    """
    value = fields.take("input")
    if isinstance(value, str):
        translation.add_message("input", {"role": "user", "content": value})
        return
    if not isinstance(value, list) or not value:
        raise fields.error("input", "must be a string, or a list of items that is not empty")
    first = len(translation.messages)
    thought = ""
    for item in fields.objects("input", _MAX_ITEMS):
        known = len(translation.messages)
        item = _referred(item, item_of)
        if item.take("type") == "reasoning":
            thought += _thought(item)
            continue
        _add_item(item, translation, first)
        if len(translation.messages) > known:
            added = translation.messages[-1]
            if thought and added["role"] == "assistant":
                added["reasoning_content"] = thought
            thought = ""


def _add_item(item: Fields, translation: Translation, first: int) -> None:
    kind = item.text("type") or "message"
    if kind == "message":
        _add_message(item, translation)
    elif kind == "function_call":
        _add_call(item, translation, first)
    elif kind == "function_call_output":
        _add_output(item, translation)
    else:
        problem = f"{kind!r:.40} is not supported here: leave such items out"
        raise item.error("type", problem, code="unsupported_parameter")


def _thought(item: Fields) -> str:
    """The text of reasoning; its summary is another's words."""
    parts = item.objects("content", _MAX_PARTS)
    return "".join(part.text("text") or "" for part in parts)


def _referred(item: Fields, item_of: Callable[[str], dict[str, Any] | None]) -> Fields:
    """The item itself, where the client sent only the id of one that it was given."""
    if item.take("type") != "item_reference":
        return item
    item_id = item.required_text("id")
    found = item_of(item_id)
    if found is None:
        raise item.error(
            "id", "is no item of a response that is kept here: send the item itself", code="item_not_found"
        )
    return Fields(found, f"{item.path}.")


def _add_message(item: Fields, translation: Translation) -> None:
    message = {"role": item.required_text("role"), "content": _text(item, "content")}
    item.ignore(*_OF_ANSWERS)
    item.refuse_others()
    translation.add_message(item.path, message)


def _text(item: Fields, name: str) -> str:
    value = item.take(name)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise item.error(name, "must be a string, or a list of parts", code="invalid_value")
    return "".join(_part(part) for part in item.objects(name, _MAX_PARTS))


def _part(part: Fields) -> str:
    kind = part.required_text("type")
    if kind not in ("input_text", "output_text", "text", "refusal"):
        problem = f"{kind!r:.40} is not supported here: this API takes text only"
        raise part.error("type", problem, code="unsupported_parameter")
    text = part.required_text("refusal" if kind == "refusal" else "text")
    part.ignore("annotations", "logprobs", "prompt_cache_breakpoint")
    part.refuse_others()
    return text


def _add_call(item: Fields, translation: Translation, first: int) -> None:
    """Add a call to the message before it, if that is the assistant's and came with this request."""
    function = {"name": item.required_text("name"), "arguments": item.required_text("arguments")}
    call = {"id": item.required_text("call_id"), "type": "function", "function": function}
    item.ignore(*_OF_ANSWERS)
    item.refuse_others()
    messages = translation.messages
    if len(messages) == first or messages[-1]["role"] != "assistant":
        translation.add_message(item.path, {"role": "assistant", "content": None})
    calls: list[dict[str, Any]] = messages[-1].setdefault("tool_calls", [])
    path = f"messages[{len(messages) - 1}].tool_calls[{len(calls)}]"
    calls.append(call)
    translation.rename(path, item.path)
    translation.rename(f"{path}.id", f"{item.path}.call_id")
    translation.rename(f"{path}.function", item.path)


def _add_output(item: Fields, translation: Translation) -> None:
    answer = {"role": "tool", "tool_call_id": item.required_text("call_id"), "content": _text(item, "output")}
    item.ignore(*_OF_ANSWERS)
    item.refuse_others()
    path = item.path
    translation.add_message(path, answer, tool_call_id=f"{path}.call_id", content=f"{path}.output")
