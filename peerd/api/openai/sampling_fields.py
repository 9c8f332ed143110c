"""Reads how a request's tokens are to be chosen."""

from __future__ import annotations

from typing import Any

from peerd.api.fields import Fields

MAX_BIASES = 1024
# The most that a field may say that counts tokens; no model has such a context.
MAX_TOKENS = 2**31 - 1


def read_sampling(fields: Fields) -> dict[str, Any]:
    """OpenAI's fields, and those that servers of open models commonly add."""
    return {
        "temperature": fields.number("temperature", 0, 2),
        # OpenAI accepts 0, which leaves only the most likely token.
        "top_p": _positive(fields.number("top_p", 0, 1)),
        "top_k": fields.integer("top_k", 0),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": _repetition_penalty(fields),
        "seed": fields.integer("seed", -(2**63) + 1, 2**63 - 1),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "logit_bias": _biases(fields),
        "min_new_tokens": fields.integer("min_tokens", 0, MAX_TOKENS),
    }


def _repetition_penalty(fields: Fields) -> float | None:
    penalty = fields.number("repetition_penalty", 0, 100)
    if penalty == 0:
        raise fields.error("repetition_penalty", "must be more than 0; 1 is off", code="invalid_value")
    return penalty


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
