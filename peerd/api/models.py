"""The models that the local API offers, by the names under which clients request them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from peerd.api.errors import ApiError

if TYPE_CHECKING:
    from peerd.client.model import SwarmModel


class Models:
    """All models that were named when the daemon started."""

    def __init__(self, models: Mapping[str, SwarmModel]) -> None:
        self._models = dict(models)
        self._since = int(time.time())

    def __iter__(self) -> Iterator[tuple[str, SwarmModel]]:
        return iter(self._models.items())

    def named(self, name: str) -> SwarmModel:
        """The model with that name, or with that digest in hex. Raises ApiError if there is none."""
        # Ollama's clients add `:latest`.
        model = self._models.get(name) or self._models.get(name.removesuffix(":latest"))
        if model is None:
            model = next((each for each in self._models.values() if each.facts.digest.hex() == name), None)
        if model is None:
            known = ", ".join(self._models) or "none: start the daemon with --model NAME=PATH"
            raise ApiError(
                404, f"there is no model {name[:100]!r} here; models: {known}", param="model", code="model_not_found"
            )
        return model

    def listed(self) -> dict[str, Any]:
        """All models in OpenAI's format."""
        return {"object": "list", "data": [self.described(name) for name in self._models]}

    def listed_for_anthropic(self) -> dict[str, Any]:
        """All models in Anthropic's format, on one page."""
        since = datetime.fromtimestamp(self._since, UTC).isoformat().replace("+00:00", "Z")
        names = list(self._models)
        data = [{"type": "model", "id": name, "display_name": name, "created_at": since} for name in names]
        ends = {"first_id": names[0], "last_id": names[-1]} if names else {"first_id": None, "last_id": None}
        return {"data": data, "has_more": False} | ends

    def described(self, name: str) -> dict[str, Any]:
        """One model in OpenAI's format, with some fields of ours. Raises ApiError."""
        facts = self.named(name).facts
        return {
            "id": name,
            "object": "model",
            "created": self._since,
            "owned_by": "peerd",
            "digest": facts.digest.hex(),
            "block_count": facts.block_count,
            "hidden_size": facts.width,
            "max_length": facts.max_length,
        }
