"""Describes the daemon's models as Ollama does. What it cannot know, such as their size in files, is 0 or empty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peerd.api.openai.tool_calls.forms import form_of

if TYPE_CHECKING:
    from peerd.client.model import SwarmModel

# A model that is offered stays; Ollama's word for that is a time far away.
_NEVER = "2318-01-01T00:00:00Z"


def listed(name: str, model: SwarmModel, since: str) -> dict[str, Any]:
    """A model in the list of all."""
    return {
        "name": name,
        "model": name,
        "modified_at": since,
        "size": 0,
        "digest": model.facts.digest.hex(),
        "details": _details(model),
    }


def running(name: str, model: SwarmModel, since: str) -> dict[str, Any]:
    """A model in the list of those that can be asked now: all can."""
    described = listed(name, model, since)
    return described | {"expires_at": _NEVER, "size_vram": 0, "context_length": model.facts.max_length}


def shown(model: SwarmModel, since: str) -> dict[str, Any]:
    """A model by itself."""
    facts, kind = model.facts, model.facts.model_type
    info = {
        "general.architecture": kind,
        f"{kind}.block_count": facts.block_count,
        f"{kind}.context_length": facts.max_length,
        f"{kind}.embedding_length": facts.width,
        f"{kind}.vocab_size": model.vocab_size,
    }
    template = model.tokenizer.get_chat_template() if model.tokenizer.chat_template else ""
    return {
        "modified_at": since,
        "details": _details(model),
        "model_info": info,
        "template": template,
        "capabilities": _capabilities(model),
    }


def _details(model: SwarmModel) -> dict[str, Any]:
    kind = model.facts.model_type
    return {
        "parent_model": "",
        "format": "",
        "family": kind,
        "families": [kind],
        "parameter_size": "",
        "quantization_level": model.facts.dtype,
    }


def _capabilities(model: SwarmModel) -> list[str]:
    capabilities = ["completion", "embedding"]
    if not model.tokenizer.chat_template:
        return capabilities
    template = model.tokenizer.get_chat_template(tools=[])
    if "tools" in template and form_of(template) is not None:
        capabilities.append("tools")
    if "enable_thinking" in template or "reasoning_effort" in template:
        capabilities.append("thinking")
    return capabilities
