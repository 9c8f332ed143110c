"""Reads the requests of OpenAI's two endpoints: their fields, limits and defaults.

A field of OpenAI's that we do not support is refused if it would change the answer, and ignored otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peerd.api.fields import Fields
from peerd.protocol.messages.session import MAX_ROWS

# OpenAI's own limits.
MAX_CHOICES = 128
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
MAX_BIASES = 1024
COMPLETION_TOKENS = 16
# OpenAI lets a chat answer fill the context; for that we would have to reserve KV on every peer.
CHAT_TOKENS = 2048
_MAX_MESSAGES = 4096
_ROLES = ("system", "developer", "user", "assistant")

_WITHOUT_EFFECT = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
_TEXT = {"type": "text"}


@dataclass(frozen=True, slots=True)
class CommonFields:
    """The fields that both endpoints have. None stands for the model's own value. `rows`: answers to each prompt."""

    model: str
    max_tokens: int | None
    rows: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    include_chain: bool
    top_logprobs: int | None
    sampling: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation that the model is to continue."""

    common: CommonFields
    messages: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Prompts to be continued, each a text or token ids. `echo`: each answer begins with its prompt."""

    common: CommonFields
    prompts: list[str | list[int]]
    echo: bool


def read_chat(fields: Fields) -> ChatRequest:
    """Read a body of /v1/chat/completions. Raises ApiError."""
    messages = _messages(fields)
    limit = fields.integer("max_completion_tokens", 1)
    older_limit = fields.integer("max_tokens", 1)
    top_logprobs = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    logprobs = fields.boolean("logprobs")
    if top_logprobs is not None and not logprobs:
        raise fields.error("top_logprobs", "needs logprobs: true")
    fields.refuse(
        {
            "audio": None,
            "function_call": "none",
            "functions": [],
            "modalities": ["text"],
            "prediction": None,
            "reasoning_effort": None,
            "response_format": _TEXT,
            "tool_choice": "none",
            "tools": [],
            "verbosity": None,
            "web_search_options": None,
        }
    )
    wanted = limit if limit is not None else older_limit
    return ChatRequest(_common(fields, wanted, (top_logprobs or 0) if logprobs else None), messages)


def read_completion(fields: Fields) -> CompletionRequest:
    """Read a body of /v1/completions. Raises ApiError."""
    prompts = _prompts(fields)
    limit = fields.integer("max_tokens", 1)
    logprobs = fields.integer("logprobs", 0, MAX_COMPLETION_LOGPROBS)
    echo = fields.boolean("echo")
    rows = fields.integer("n", 1, MAX_CHOICES) or 1
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    if best_of not in (None, rows):
        raise fields.error("best_of", "is not supported beyond n: leave it out")
    if echo and logprobs is not None:
        raise fields.error("echo", "is not supported together with logprobs")
    if len(prompts) * rows > MAX_ROWS:
        raise fields.error("n", f"asks for more than {MAX_ROWS} answers at once")
    fields.refuse({"suffix": ""})
    return CompletionRequest(_common(fields, limit or COMPLETION_TOKENS, logprobs), prompts, echo)


def _common(fields: Fields, max_tokens: int | None, top_logprobs: int | None) -> CommonFields:
    stream = fields.boolean("stream")
    options = fields.group("stream_options")
    include_usage = include_chain = False
    if options is not None:
        if not stream:
            raise fields.error("stream_options", "needs stream: true")
        include_usage = options.boolean("include_usage")
        # Our own addition for people who watch the chain: the peers that compute the answer (spec/local-api.md).
        include_chain = options.boolean("include_chain")
        options.ignore("include_obfuscation")
        options.refuse_others()
    common = CommonFields(
        model=fields.required_text("model"),
        max_tokens=max_tokens,
        rows=fields.integer("n", 1, MAX_CHOICES) or 1,
        stop=_stops(fields),
        stream=stream,
        include_usage=include_usage,
        include_chain=include_chain,
        top_logprobs=top_logprobs,
        sampling=_sampling(fields),
    )
    fields.ignore(*_WITHOUT_EFFECT)
    fields.refuse_others()
    return common


def _sampling(fields: Fields) -> dict[str, Any]:
    """OpenAI's fields, and those that servers of open models commonly add."""
    return {
        "temperature": fields.number("temperature", 0, 2),
        # OpenAI accepts 0, which leaves only the most likely token.
        "top_p": _positive(fields.number("top_p", 0, 1)),
        "top_k": fields.integer("top_k", 0),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": _positive(fields.number("repetition_penalty", 0, 100)),
        "seed": fields.integer("seed", -(2**63) + 1, 2**63 - 1),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "logit_bias": _biases(fields),
    }


def _positive(value: float | None) -> float | None:
    return None if value is None else max(value, 1e-9)


def _biases(fields: Fields) -> list[tuple[int, float]]:
    group = fields.group("logit_bias")
    if group is None:
        return []
    biases = []
    for name in group.names():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise group.error(name, "is no token id")
        biases.append((int(name), group.number(name, -100, 100) or 0.0))
    if len(biases) > MAX_BIASES:
        raise fields.error("logit_bias", f"has more than {MAX_BIASES} tokens")
    return biases


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else value or []
    fits = isinstance(stops, list) and len(stops) <= MAX_STOPS and all(isinstance(stop, str) and stop for stop in stops)
    if not fits:
        raise fields.error("stop", f"must be a string or up to {MAX_STOPS} strings, none of them empty")
    return tuple(stops)


def _prompts(fields: Fields) -> list[str | list[int]]:
    value = fields.take("prompt")
    if isinstance(value, str) or _is_token_ids(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(one, str) or _is_token_ids(one) for one in value):
        return value
    raise fields.error("prompt", "must be a string, token ids, or a list of such; none of them empty")


def _is_token_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    )


def _messages(fields: Fields) -> list[dict[str, Any]]:
    value = fields.take("messages")
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_MESSAGES:
        raise fields.error("messages", f"must be a list of 1 to {_MAX_MESSAGES} messages")
    return [_message(fields, number, message) for number, message in enumerate(value)]


def _message(fields: Fields, number: int, value: object) -> dict[str, Any]:
    path = f"messages[{number}]"
    if not isinstance(value, dict):
        raise fields.error(path, "must be an object")
    role = value.get("role")
    if role not in _ROLES:
        raise fields.error(f"{path}.role", f"must be one of {', '.join(_ROLES)}")
    if value.get("tool_calls") or value.get("function_call"):
        raise fields.error(path, "has tool calls, which are not supported here")
    message = {"role": "system" if role == "developer" else role, "content": _content(fields, path, value)}
    if isinstance(value.get("name"), str):
        message["name"] = value["name"]
    return message


def _content(fields: Fields, path: str, value: dict[str, Any]) -> str:
    content = value.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(_is_text_part(part) for part in content):
        return "".join(part["text"] for part in content)
    raise fields.error(f"{path}.content", "must be a string, or parts of type text: this API takes text only")


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
