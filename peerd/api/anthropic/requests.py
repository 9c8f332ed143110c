"""Reads the requests of /v1/messages: their fields but the messages, and what of them is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peerd.api.anthropic.messages import add_messages, joined_text
from peerd.api.fields import Fields
from peerd.api.openai.requests import ChatRequest, read_chat
from peerd.api.openai.tool_fields import MAX_TOOLS
from peerd.api.translation import Translation

# Fields that change no token of an answer.
_WITHOUT_EFFECT = (
    "cache_control",
    "diagnostics",
    "inference_geo",
    "metadata",
    "service_tier",
    "speed",
    "user_profile_id",
    "workspace_id",
)
_UNSUPPORTED: dict[str, Any] = {"container": None, "mcp_servers": []}
_TOOL_WITHOUT_EFFECT = ("allowed_callers", "cache_control", "eager_input_streaming")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# The effort that Anthropic's API has where none is asked for.
_USUAL_EFFORT = "high"


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """A conversation that the model is to continue, with the client's own names of its fields."""

    chat: ChatRequest
    translation: Translation


def read_messages_request(fields: Fields) -> MessagesRequest:
    """Read a body of /v1/messages. Raises ApiError."""
    if fields.take("max_tokens") is None:
        raise fields.error("max_tokens", "is missing", code="missing_required_parameter")
    return _read(fields)


def read_count_request(fields: Fields) -> MessagesRequest:
    """Read a body of /v1/messages/count_tokens, which needs no `max_tokens`. Raises ApiError."""
    return _read(fields)


def _read(fields: Fields) -> MessagesRequest:
    translation = Translation()
    translation.copy(fields, "model", "max_tokens", "stream", "temperature", "top_p", "top_k")
    translation.put("stop", fields.take("stop_sequences"), "stop_sequences")
    system = fields.take("system")
    if system is not None:
        translation.add_message("system", {"role": "system", "content": joined_text(fields, "system", system)})
    add_messages(fields, translation)
    _put_tools(fields, translation)
    _put_thinking(fields, translation)
    _put_output(fields, translation)
    _check_context_management(fields)
    fields.refuse(_UNSUPPORTED)
    fields.ignore(*_WITHOUT_EFFECT)
    fields.refuse_others()
    return MessagesRequest(translation.read(read_chat), translation)


def _put_tools(fields: Fields, translation: Translation) -> None:
    tools = [_tool(number, tool, translation) for number, tool in enumerate(fields.objects("tools", MAX_TOOLS))]
    translation.put("tools", tools or None)
    choice = fields.group("tool_choice")
    if choice is None:
        return
    kind = choice.required_text("type")
    if kind == "tool":
        chosen: Any = {"type": "function", "function": {"name": choice.required_text("name")}}
    elif kind in _CHOICES:
        chosen = _CHOICES[kind]
    else:
        raise choice.error("type", "must be auto, any, tool or none", code="invalid_value")
    if choice.boolean("disable_parallel_tool_use"):
        translation.put("parallel_tool_calls", False)
    choice.refuse_others()
    translation.put("tool_choice", chosen, "tool_choice")
    translation.rename("tool_choice.function", "tool_choice")


def _tool(number: int, tool: Fields, translation: Translation) -> dict[str, Any]:
    if tool.text("type") not in (None, "custom"):
        raise tool.error("type", "must be custom: this daemon has no tools of its own", code="unsupported_parameter")
    tool.refuse({"defer_loading": False, "input_examples": []})
    tool.ignore(*_TOOL_WITHOUT_EFFECT)
    schema = tool.group("input_schema")
    if schema is None:
        raise tool.error("input_schema", "is missing", code="missing_required_parameter")
    given = {"name": tool.take("name"), "description": tool.take("description"), "strict": tool.take("strict")}
    function = given | {"parameters": tool.take("input_schema")}
    tool.refuse_others()
    path = f"tools[{number}]"
    translation.rename(f"{path}.function", path)
    translation.rename(f"{path}.function.parameters", f"{path}.input_schema")
    return {"type": "function", "function": function}


def _put_thinking(fields: Fields, translation: Translation) -> None:
    thinking = fields.group("thinking")
    if thinking is None:
        return
    kind = thinking.required_text("type")
    # How it is shown is for those whose thoughts are kept secret.
    thinking.ignore("display")
    if kind == "disabled":
        translation.put("chat_template_kwargs", {"enable_thinking": False})
    elif kind != "adaptive":
        problem = "must be adaptive or disabled: no budget of thoughts can be kept here"
        raise thinking.error("type", problem, code="unsupported_parameter")
    thinking.refuse_others()


def _put_output(fields: Fields, translation: Translation) -> None:
    output = fields.group("output_config")
    if output is None:
        return
    effort = output.text("effort")
    translation.put("reasoning_effort", None if effort == _USUAL_EFFORT else effort, "output_config.effort")
    form = output.group("format")
    if form is not None:
        if form.required_text("type") != "json_schema" or form.group("schema") is None:
            raise form.error("type", "must be json_schema, with a schema", code="invalid_value")
        schema = {"name": "answer", "schema": form.take("schema"), "strict": True}
        form.refuse_others()
        translation.put("response_format", {"type": "json_schema", "json_schema": schema}, "output_config.format")
        translation.rename("response_format.json_schema", "output_config.format")
    output.refuse_others()


def _check_context_management(fields: Fields) -> None:
    """Accept what leaves the conversation as it is. Which past thoughts the model sees, its template decides."""
    management = fields.group("context_management")
    if management is None:
        return
    for edit in management.objects("edits", 16):
        if not edit.required_text("type").startswith("clear_thinking_"):
            raise edit.error("type", "is not supported here: leave it out", code="unsupported_parameter")
        edit.ignore("keep")
        edit.refuse_others()
    management.refuse_others()
