"""Reads the requests of /v1/responses: their fields but the input, and what of them is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peerd.api.errors import invalid
from peerd.api.fields import Fields
from peerd.api.openai.requests import ChatRequest, read_chat
from peerd.api.openai.tool_fields import MAX_TOOLS
from peerd.api.responses.items import add_input
from peerd.api.responses.store import ResponseStore, Stored, memory_of
from peerd.api.translation import Translation

# Fields that change no token of an answer. `max_tool_calls` counts calls of OpenAI's own tools.
_WITHOUT_EFFECT = (
    "client_metadata",
    "max_tool_calls",
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
)
# What we do not have, each with the value that asks for what happens anyway.
_UNSUPPORTED: dict[str, Any] = {
    "access_programs": None,
    "background": False,
    "background_options": None,
    "context_management": [],
    "conversation": None,
    "image": None,
    "moderation": None,
    "prompt": None,
    "top_logprobs": 0,
    "truncation": "disabled",
}
# What a client may ask to be shown of items that no answer here has.
_INCLUDABLE = frozenset(
    {
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
# Tools that agents offer always and that nobody has to call; the model is not told of them.
_PASSED_OVER = ("namespace", "tool_search", "web_search")


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """A conversation that the model is to continue. `earlier`: its messages before this request's, without
    instructions. `shown`: the fields that the response repeats. `size_bytes`: of all that is to be kept of it.
    """

    chat: ChatRequest
    translation: Translation
    messages: tuple[dict[str, Any], ...]
    shown: dict[str, Any]
    is_kept: bool
    size_bytes: int


def read_responses_request(fields: Fields, store: ResponseStore) -> ResponsesRequest:
    """Read a body of /v1/responses, which may go on from what is kept in `store`. Raises ApiError."""
    translation = Translation()
    translation.copy(fields, "model", "stream", "temperature", "top_p", "parallel_tool_calls")
    translation.put("max_completion_tokens", fields.take("max_output_tokens"), "max_output_tokens")
    instructions = fields.text("instructions")
    if instructions is not None:
        translation.add_message("instructions", {"role": "system", "content": instructions})
    first = len(translation.messages)
    earlier = _earlier(fields, store)
    for message in earlier.messages if earlier is not None else ():
        translation.add_message("previous_response_id", message)
    add_input(fields, translation, store.item)
    _put_tools(fields, translation)
    _put_text(fields, translation)
    _put_reasoning(fields, translation)
    _check_rest(fields)
    is_kept = fields.boolean("store") or fields.take("store") is None
    fields.refuse_others()
    size = memory_of([fields.take(name) for name in fields.names()]) if is_kept else 0
    return ResponsesRequest(
        translation.read(read_chat),
        translation,
        tuple(translation.messages[first:]),
        _shown(fields, is_kept),
        is_kept,
        size + (earlier.size_bytes if earlier is not None else 0),
    )


def _earlier(fields: Fields, store: ResponseStore) -> Stored | None:
    response_id = fields.text("previous_response_id")
    if response_id is None:
        return None
    found = store.get(response_id)
    if found is None:
        name = "previous_response_id"
        problem = f"{name}: there is no response {response_id[:100]!r} here: one is kept for an hour, if there is room"
        raise invalid(problem, name, code="previous_response_not_found")
    return found


def _put_tools(fields: Fields, translation: Translation) -> None:
    tools: list[dict[str, Any]] = []
    for tool in fields.objects("tools", MAX_TOOLS):
        kind = tool.required_text("type")
        if kind.startswith(_PASSED_OVER):
            continue
        if kind != "function":
            problem = f"{kind!r:.40} is not supported here: only tools of type function are"
            raise tool.error("type", problem, code="unsupported_parameter")
        translation.rename(f"tools[{len(tools)}].function", tool.path)
        tools.append({"type": "function", "function": _function(tool)})
    translation.put("tools", tools or None)
    choice = fields.take("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    translation.put("tool_choice", choice)
    translation.rename("tool_choice.function", "tool_choice")


def _function(tool: Fields) -> dict[str, Any]:
    tool.refuse({"async": False, "defer_loading": False})
    tool.ignore("allowed_callers", "output_schema")
    function = {name: tool.take(name) for name in ("name", "description", "parameters", "strict")}
    tool.refuse_others()
    return function


def _put_text(fields: Fields, translation: Translation) -> None:
    text = fields.group("text")
    if text is None:
        return
    translation.put("verbosity", text.take("verbosity"), "text.verbosity")
    form = text.group("format")
    if form is not None:
        wanted: dict[str, Any] = {"type": form.required_text("type")}
        if wanted["type"] == "json_schema":
            names = ("name", "schema", "strict", "description")
            wanted["json_schema"] = {name: form.take(name) for name in names if form.take(name) is not None}
        form.refuse_others()
        translation.put("response_format", wanted, "text.format")
        translation.rename("response_format.json_schema", "text.format")
    text.refuse_others()


def _put_reasoning(fields: Fields, translation: Translation) -> None:
    reasoning = fields.group("reasoning")
    if reasoning is None:
        return
    translation.put("reasoning_effort", reasoning.take("effort"), "reasoning.effort")
    # Summaries are for those whose reasoning is kept secret.
    reasoning.ignore("generate_summary", "summary")
    reasoning.refuse_others()


def _check_rest(fields: Fields) -> None:
    included = fields.take("include") or []
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise fields.error("include", "must be a list of strings", code="invalid_value")
    for number, name in enumerate(included):
        if name not in _INCLUDABLE:
            raise fields.error(
                f"include[{number}]", "is not supported here: leave it out", code="unsupported_parameter"
            )
    options = fields.group("stream_options")
    if options is not None:
        options.ignore("include_obfuscation")
        options.refuse_others()
    fields.group("metadata")
    fields.refuse(_UNSUPPORTED)
    fields.ignore(*_WITHOUT_EFFECT)


def _shown(fields: Fields, is_kept: bool) -> dict[str, Any]:
    """What a response repeats of its request."""
    text, reasoning = fields.take("text") or {}, fields.take("reasoning") or {}
    names = ("instructions", "max_output_tokens", "previous_response_id", "temperature", "top_p", "user")
    parallel = fields.take("parallel_tool_calls")
    return {name: fields.take(name) for name in names} | {
        "background": False,
        "metadata": fields.take("metadata") or {},
        "parallel_tool_calls": True if parallel is None else parallel,
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "store": is_kept,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": fields.take("tool_choice") or "auto",
        "tools": fields.take("tools") or [],
        "truncation": "disabled",
    }
