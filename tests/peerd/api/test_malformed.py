"""Whatever JSON a client sends to any API, it is read or refused by name: nothing else is raised, whole or streamed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.api.anthropic.requests import read_count_request, read_messages_request
from peerd.api.embeddings.requests import read_embed, read_embedding, read_older_embed
from peerd.api.errors import ApiError
from peerd.api.fields import Fields
from peerd.api.ollama.requests import read_chat_request, read_generate_request
from peerd.api.openai.requests import read_chat, read_completion
from peerd.api.responses.requests import read_responses_request
from peerd.api.responses.store import ResponseStore

CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "d", "parameters": CITY, "strict": False}
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "stream": True, "model": "m"}
JSON_FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": CITY, "strict": True}}

OPENAI = SAMPLING | {
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "a"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "b"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "auto",
    "stream_options": {"include_usage": True},
    "logit_bias": {"1": 2},
    "chat_template_kwargs": {"a": 1},
}
ANTHROPIC = SAMPLING | {
    "max_tokens": 5,
    "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "a", "signature": ""},
                {"type": "tool_use", "id": "c", "name": "weather", "input": {"city": "a"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "b", "is_error": True}]},
    ],
    "stop_sequences": ["a"],
    "tools": [{"name": "weather", "input_schema": CITY, "description": "d"}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
}
RESPONSES = SAMPLING | {
    "instructions": "a",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "b"},
    ],
    "tools": [{"type": "function"} | FUNCTION, {"type": "web_search"}],
    "tool_choice": {"type": "function", "name": "weather"},
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "metadata": {"a": "b"},
    "previous_response_id": None,
    "store": True,
}
OLLAMA = {
    "model": "m",
    "stream": False,
    "messages": [
        {"role": "user", "content": "a", "images": []},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]},
        {"role": "tool", "tool_name": "weather", "content": "b"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "options": {"temperature": 0.5, "num_predict": 5, "stop": ["a"], "repeat_last_n": -1, "num_ctx": 9},
    "think": False,
    "keep_alive": "5m",
}
PROMPT = {"model": "m", "prompt": "a", "system": "b", "options": {"num_predict": -1}, "raw": False, "format": ""}

READERS = {
    "chat": (read_chat, OPENAI),
    "form": (read_chat, SAMPLING | {"messages": [{"role": "user", "content": "a"}], "response_format": JSON_FORM}),
    "completion": (read_completion, SAMPLING | {"prompt": [[1, 2], [3]], "stop": ["a"], "logprobs": 2}),
    "messages": (read_messages_request, ANTHROPIC),
    "count": (read_count_request, ANTHROPIC),
    "responses": (partial(read_responses_request, store=ResponseStore(time.monotonic)), RESPONSES),
    "ollama": (read_chat_request, OLLAMA),
    "prompt": (read_generate_request, PROMPT),
    "raw": (read_generate_request, PROMPT | {"raw": True, "system": ""}),
    "embedding": (read_embedding, {"model": "m", "input": ["a", [1, 2]], "encoding_format": "float"}),
    "embed": (read_embed, {"model": "m", "input": ["a"], "options": {}}),
    "older embed": (read_older_embed, {"model": "m", "prompt": "a"}),
}
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
WORDS = st.sampled_from(["auto", "none", "function", "text", "type", "message", "user", "json_schema", "tool", "id"])
NAMES = WORDS | st.text(min_size=1, max_size=5)
VALUES = st.recursive(
    LEAVES | WORDS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a value something else may be put."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


@pytest.mark.parametrize("name", READERS)
def test_the_usual_request_is_read(name: str) -> None:
    read, body = READERS[name]
    if name != "responses":
        assert read(Fields(body))


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_a_request_with_anything_in_any_place_is_read_or_refused_by_name(name: str, data: st.DataObject) -> None:
    read, body = READERS[name]
    body = copy.deepcopy(body)
    *way, last = data.draw(st.sampled_from(places(body)[1:]))
    holder: Any = body
    for key in way:
        holder = holder[key]
    if isinstance(holder, dict) and data.draw(st.booleans()):
        last = data.draw(NAMES)
    holder[last] = data.draw(VALUES)
    refusal = refusal_of(read, body)
    if refusal is not None:
        assert refusal.status == 400
        assert refusal.param
        assert len(str(refusal)) < 1000


def refusal_of(read: Callable[[Fields], object], body: dict[str, Any]) -> ApiError | None:
    try:
        read(Fields(body))
    except ApiError as error:
        return error
    return None
