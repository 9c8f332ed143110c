"""Reads the requests for embeddings: OpenAI's, and Ollama's two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peerd.api.fields import Fields
from peerd.api.openai.requests import is_token_ids

# OpenAI's own limits.
MAX_INPUTS = 2048
MAX_TOKENS = 300_000


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts, each as it is or as token ids. `name`: what the client calls the field with them."""

    model: str
    inputs: list[str | list[int]]
    name: str = "input"
    as_base64: bool = False

    def path(self, number: int) -> str:
        """What the client calls an input."""
        return self.name if len(self.inputs) == 1 else f"{self.name}[{number}]"


def read_embedding(fields: Fields) -> EmbeddingRequest:
    """Read a body of /v1/embeddings. Raises ApiError."""
    encoding = fields.text("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise fields.error("encoding_format", "must be float or base64", code="invalid_value")
    fields.refuse({"dimensions": None})
    fields.ignore("user")
    return _request(fields, _inputs(fields, "input"), as_base64=encoding == "base64")


def read_embed(fields: Fields) -> EmbeddingRequest:
    """Read a body of Ollama's /api/embed. Raises ApiError."""
    _accept_ollama_s(fields)
    inputs = _inputs(fields, "input")
    if not all(isinstance(text, str) for text in inputs):
        raise fields.error("input", "must be a string or a list of strings", code="invalid_value")
    return _request(fields, inputs)


def read_older_embed(fields: Fields) -> EmbeddingRequest:
    """Read a body of Ollama's /api/embeddings. Raises ApiError."""
    _accept_ollama_s(fields)
    return _request(fields, [fields.required_text("prompt")], name="prompt")


def _request(fields: Fields, inputs: list[str | list[int]], **others: Any) -> EmbeddingRequest:
    request = EmbeddingRequest(fields.required_text("model"), inputs, **others)
    fields.refuse_others()
    return request


def _accept_ollama_s(fields: Fields) -> None:
    # Options tell how an answer is sampled, and there is none.
    fields.group("options")
    fields.ignore("keep_alive", "truncate")
    fields.refuse({"dimensions": None})


def _inputs(fields: Fields, name: str) -> list[str | list[int]]:
    value = fields.take(name)
    if isinstance(value, str) or is_token_ids(value):
        return [value]
    fits = isinstance(value, list) and 0 < len(value) <= MAX_INPUTS
    if fits and all(isinstance(one, str) or is_token_ids(one) for one in value):
        return list(value)
    raise fields.error(name, f"must be a string, token ids, or a list of at most {MAX_INPUTS} such; none of them empty")
