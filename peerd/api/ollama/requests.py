"""Reads the requests of /api/chat and /api/generate.

Ollama's messages name no call: what a tool said answers the first call of that name that has no answer yet, so calls
get ids here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from peerd.api.fields import Fields
from peerd.api.ollama.options import put_common
from peerd.api.openai.requests import ChatRequest, CompletionRequest, read_chat, read_completion
from peerd.api.translation import Translation

_MAX_MESSAGES = 4096
_MAX_CALLS = 128
# What we do not have, each with the value that asks for nothing.
_UNSUPPORTED: dict[str, Any] = {
    "context": [],
    "height": None,
    "images": [],
    "steps": None,
    "suffix": "",
    "template": "",
    "width": None,
}


@dataclass(frozen=True, slots=True)
class OllamaRequest:
    """`wanted` is None if the client only wants the model to be loaded. A completion is a text without a template."""

    model: str
    wanted: ChatRequest | CompletionRequest | None
    translation: Translation


def read_chat_request(fields: Fields) -> OllamaRequest:
    """Read a body of /api/chat. Raises ApiError."""
    translation = Translation()
    put_common(fields, translation)
    translation.put("tools", fields.take("tools"), "tools")
    _add_messages(fields, translation)
    fields.refuse_others()
    wanted = translation.read(read_chat) if translation.messages else None
    return OllamaRequest(fields.required_text("model"), wanted, translation)


def read_generate_request(fields: Fields) -> OllamaRequest:
    """Read a body of /api/generate. Raises ApiError."""
    translation = Translation()
    put_common(fields, translation)
    prompt, system, is_raw = fields.text("prompt"), fields.text("system"), fields.boolean("raw")
    fields.refuse(_UNSUPPORTED)
    fields.refuse_others()
    model = fields.required_text("model")
    if not prompt:
        return OllamaRequest(model, None, translation)
    if is_raw:
        if system:
            raise fields.error("system", "is not for a raw prompt: write it into that")
        translation.put("prompt", prompt, "prompt")
        return OllamaRequest(model, _as_long_as_a_chat(translation, fields), translation)
    if system:
        translation.add_message("system", {"role": "system", "content": system})
    translation.add_message("prompt", {"role": "user", "content": prompt})
    return OllamaRequest(model, translation.read(read_chat), translation)


def _as_long_as_a_chat(translation: Translation, fields: Fields) -> CompletionRequest:
    """A completion, which without a limit goes on for as long as an answer in a chat may."""
    wanted = translation.read(read_completion)
    limit = (fields.take("options") or {}).get("num_predict")
    return replace(wanted, common=replace(wanted.common, max_tokens=None if limit == -1 else limit))


def _add_messages(fields: Fields, translation: Translation) -> None:
    # The ids of calls without an answer, with their names, in their order.
    waiting: list[tuple[str, str]] = []
    for number, message in enumerate(fields.objects("messages", _MAX_MESSAGES)):
        role, content = message.required_text("role"), message.text("content") or ""
        translated: dict[str, Any] = {"role": role, "content": content}
        message.refuse({"images": []})
        thought = message.text("thinking")
        if thought and role == "assistant":
            translated["reasoning_content"] = thought
        calls = [
            _call(call, f"call_{number}_{place}", translation, f"messages[{number}].tool_calls[{place}]")
            for place, call in enumerate(message.objects("tool_calls", _MAX_CALLS))
        ]
        if calls:
            waiting += [(call["id"], call["function"]["name"]) for call in calls]
            translated |= {"content": content or None, "tool_calls": calls}
        if role == "tool":
            translated["tool_call_id"] = _answered(message, waiting)
        else:
            message.ignore("tool_call_id", "tool_name")
        message.refuse_others()
        translation.add_message(message.path, translated)


def _call(call: Fields, usual_id: str, translation: Translation, path: str) -> dict[str, Any]:
    function = call.group("function")
    if function is None:
        raise call.error("function", "is missing", code="missing_required_parameter")
    if function.group("arguments") is None and function.take("arguments") is not None:
        raise function.error("arguments", "must be an object")
    arguments = json.dumps(function.take("arguments") or {}, ensure_ascii=False)
    function.ignore("description", "index")
    written = {"name": function.required_text("name"), "arguments": arguments}
    function.refuse_others()
    call.ignore("type")
    call_id = call.text("id") or usual_id
    call.refuse_others()
    translation.rename(path, call.path)
    return {"id": call_id, "type": "function", "function": written}


def _answered(message: Fields, waiting: list[tuple[str, str]]) -> str:
    """The id of the call that a tool's message answers, which then has its answer."""
    call_id, name = message.text("tool_call_id"), message.text("tool_name") or message.text("name")
    for place, (each_id, each_name) in enumerate(waiting):
        if (each_id == call_id) if call_id else (name in (None, each_name)):
            del waiting[place]
            return each_id
    raise message.error("tool_call_id" if call_id else "tool_name", "names no call before it that has no answer yet")
