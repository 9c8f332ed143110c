"""Reads the fields that Ollama's two endpoints for text have in common: options, format and thinking."""

from __future__ import annotations

from typing import Any

from peerd.api.fields import Fields
from peerd.api.translation import Translation

# Ollama's options, and what chats call them.
_SAME = {
    "frequency_penalty": "frequency_penalty",
    "min_p": "min_p",
    "presence_penalty": "presence_penalty",
    "repeat_penalty": "repetition_penalty",
    "seed": "seed",
    "stop": "stop",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
# How a machine runs a model, which is each server's own affair here.
_OF_MACHINES = (
    "draft_num_predict",
    "embedding_only",
    "f16_kv",
    "logits_all",
    "low_vram",
    "main_gpu",
    "num_batch",
    "num_gpu",
    "num_keep",
    "num_thread",
    "numa",
    "use_mlock",
    "use_mmap",
    "vocab_only",
)
# What we do not have, each with the value that is off.
_UNSUPPORTED = {"mirostat": 0, "tfs_z": 1, "typical_p": 1}
_UNSUPPORTED_FIELDS: dict[str, Any] = {"logprobs": False, "top_logprobs": 0}


def put_common(fields: Fields, translation: Translation) -> None:
    """Translate everything but messages, prompt and tools. Raises ApiError."""
    translation.copy(fields, "model")
    # Ollama streams unless it is told otherwise.
    translation.put("stream", True if fields.take("stream") is None else fields.take("stream"), "stream")
    _put_options(fields, translation)
    _put_format(fields, translation)
    _put_thinking(fields, translation)
    fields.refuse(_UNSUPPORTED_FIELDS)
    fields.ignore("keep_alive", "shift", "truncate")


def _put_options(fields: Fields, translation: Translation) -> None:
    options = fields.group("options")
    if options is None:
        return
    for own, name in _SAME.items():
        translation.put(name, options.take(own), f"options.{own}")
    limit = options.integer("num_predict", -1)
    if limit == 0:
        raise options.error("num_predict", "must be at least 1, or -1 for as many as there is room for")
    # -1 is Ollama's default, and stands for ours.
    translation.put("max_tokens", limit if limit != -1 else None, "options.num_predict")
    window = options.integer("repeat_last_n", -1)
    if window not in (None, -1) and options.take("repeat_penalty") not in (None, 1):
        problem = "is not supported here: repeat_penalty counts all tokens, so leave this out"
        raise options.error("repeat_last_n", problem, code="unsupported_parameter")
    # What does not fit is refused here, and never cut.
    options.integer("num_ctx", 1)
    options.refuse(_UNSUPPORTED)
    options.ignore(*_OF_MACHINES, "mirostat_eta", "mirostat_tau", "penalize_newline")
    options.refuse_others()


def _put_format(fields: Fields, translation: Translation) -> None:
    form = fields.take("format")
    if form in (None, ""):
        return
    if form == "json":
        wanted: dict[str, Any] = {"type": "json_object"}
    elif isinstance(form, dict):
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": form}}
    else:
        raise fields.error("format", "must be json, or a JSON schema", code="invalid_value")
    translation.put("response_format", wanted, "format")
    translation.rename("response_format.json_schema.schema", "format")


def _put_thinking(fields: Fields, translation: Translation) -> None:
    think = fields.take("think")
    if isinstance(think, bool):
        translation.put("chat_template_kwargs", {"enable_thinking": think})
    elif isinstance(think, str) or think is None:
        translation.put("reasoning_effort", think, "think")
    else:
        raise fields.error("think", "must be true, false, or an effort such as high", code="invalid_value")
