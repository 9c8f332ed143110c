"""Turns Anthropic's messages, whose content is blocks, into those of chats.

One message may hold text, calls and what several tools answered; a chat has a message for each of these. Thoughts of
past answers are the template's to show: most show those that lead to the calls of a turn that is not over.
"""

from __future__ import annotations

import json
from typing import Any

from peerd.api.fields import Fields
from peerd.api.translation import Translation

_MAX_MESSAGES = 4096
_MAX_BLOCKS = 4096
_ROLES = ("user", "assistant", "system")
_TEXT_ONLY = "is not supported here: this API takes text only"
# Blocks of text from a program are paragraphs of their own: instructions, reminders, what the user said.
_BETWEEN_BLOCKS = "\n\n"


def add_messages(fields: Fields, translation: Translation) -> None:
    """Translate `messages`. Raises ApiError."""
    messages = fields.objects("messages", _MAX_MESSAGES)
    if not messages:
        raise fields.error("messages", f"must be a list of 1 to {_MAX_MESSAGES} messages")
    for message in messages:
        role = message.required_text("role")
        if role not in _ROLES:
            raise message.error("role", f"must be one of {', '.join(_ROLES)}")
        if role == "assistant":
            _add_assistant(message, translation)
        elif role == "user":
            _add_user(message, translation)
        else:
            content = joined_text(message, "content", message.take("content"))
            translation.add_message(message.path, {"role": "system", "content": content})
        message.refuse_others()
    last = translation.messages[-1]
    if last["role"] == "assistant" and "tool_calls" not in last:
        # As in Anthropic's API, the answer goes on where the client ended it.
        translation.put("continue_final_message", True)
        translation.put("add_generation_prompt", False)


def joined_text(fields: Fields, name: str, value: Any) -> str:
    """The text of a string, or of blocks that are all text. Raises ApiError."""
    if isinstance(value, str):
        return value
    return _BETWEEN_BLOCKS.join(_text(block) for block in _blocks(fields, name))


def _blocks(fields: Fields, name: str) -> list[Fields]:
    if not isinstance(fields.take(name), list):
        raise fields.error(name, "must be a string, or a list of blocks", code="invalid_value")
    return fields.objects(name, _MAX_BLOCKS)


def _text(block: Fields) -> str:
    kind = block.required_text("type")
    if kind != "text":
        raise block.error("type", f"{kind!r:.40} {_TEXT_ONLY}", code="unsupported_parameter")
    block.ignore("cache_control", "citations")
    text = block.required_text("text")
    block.refuse_others()
    return text


def _add_user(message: Fields, translation: Translation) -> None:
    content = message.take("content")
    if isinstance(content, str):
        translation.add_message(message.path, {"role": "user", "content": content})
        return
    texts: list[str] = []

    def add_texts() -> None:
        if texts:
            translation.add_message(message.path, {"role": "user", "content": _BETWEEN_BLOCKS.join(texts)})
            texts.clear()

    blocks = _blocks(message, "content")
    for block in blocks:
        if block.take("type") == "tool_result":
            add_texts()
            _add_result(block, translation)
        else:
            texts.append(_text(block))
    if not blocks:
        texts.append("")
    add_texts()


def _add_result(block: Fields, translation: Translation) -> None:
    call_id = block.required_text("tool_use_id")
    content = block.take("content")
    text = "" if content is None else joined_text(block, "content", content)
    if block.boolean("is_error"):
        # Chat templates have no other way to say so.
        text = f"Error: {text}"
    block.ignore("cache_control")
    block.refuse_others()
    answer = {"role": "tool", "tool_call_id": call_id, "content": text}
    translation.add_message(block.path, answer, tool_call_id=f"{block.path}.tool_use_id")


def _add_assistant(message: Fields, translation: Translation) -> None:
    content = message.take("content")
    if isinstance(content, str):
        translation.add_message(message.path, {"role": "assistant", "content": content})
        return
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[tuple[str, dict[str, Any]]] = []
    for block in _blocks(message, "content"):
        kind = block.take("type")
        if kind == "tool_use":
            calls.append((block.path, _call(block)))
        elif kind == "thinking":
            thoughts.append(block.required_text("thinking"))
        elif kind != "redacted_thinking":
            texts.append(_text(block))
    translated: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        translated["reasoning_content"] = "".join(thoughts)
    if calls:
        translated |= {"content": translated["content"] or None, "tool_calls": [call for _, call in calls]}
    # The calls have paths of their own in the client's request.
    paths = {f"tool_calls[{number}]": path for number, (path, _) in enumerate(calls)}
    inner = {f"{call}.function.{name}": f"{path}.{own}" for call, path in paths.items() for name, own in _CALL_FIELDS}
    translation.add_message(message.path, translated, **paths, **inner)


_CALL_FIELDS = (("name", "name"), ("arguments", "input"))


def _call(block: Fields) -> dict[str, Any]:
    if block.group("input") is None:
        raise block.error("input", "must be an object")
    arguments = json.dumps(block.take("input"), ensure_ascii=False)
    call_id, name = block.required_text("id"), block.required_text("name")
    block.ignore("cache_control", "caller", "toolset_name")
    block.refuse_others()
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
