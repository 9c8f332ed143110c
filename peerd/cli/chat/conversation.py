"""A conversation: what was said, the system prompt, and the settings of the next answer. Waits for nothing."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from typing import Any

from peerd.protocol.errors import InvalidRequest

# What /set takes, and of which kind; the daemon knows their ranges.
SETTINGS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "seed": int,
    "max_tokens": int,
}


@dataclass(slots=True)
class Conversation:
    """The turns so far, in the order in which they were said. `system`: "" for none."""

    model: str
    system: str = ""
    settings: dict[str, int | float] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """The user says something. It takes the place of a question to which there is no answer."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()
        self.turns.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        """The model has said something, also if it was stopped in mid-sentence; nothing is no turn."""
        if text:
            self.turns.append({"role": "assistant", "content": text})

    def take_back_answer(self) -> None:
        """Forget the last answer, so that the question before it is asked again. Raises InvalidRequest."""
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        if not self.turns:
            raise InvalidRequest("there is nothing to ask again: nothing was asked yet")

    def clear(self) -> None:
        """Forget what was said; the system prompt and the settings stay."""
        self.turns.clear()

    def set(self, name: str, text: str) -> None:
        """Change a setting; no text takes the model's own value. Raises InvalidRequest."""
        kind = SETTINGS.get(name)
        if kind is None:
            near = difflib.get_close_matches(name, SETTINGS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SETTINGS)}"
            raise InvalidRequest(f"there is no setting {name!r}: {hint}")
        if not text:
            self.settings.pop(name, None)
            return
        try:
            self.settings[name] = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise InvalidRequest(f"{name} is {what}, not {text!r}") from None

    def request(self) -> dict[str, Any]:
        """The body that asks the local API for the next answer, as a stream."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": self.model,
            "messages": [*system, *self.turns],
            "stream": True,
            "stream_options": {"include_usage": True, "include_chain": True},
            **self.settings,
        }

    def to_json(self) -> str:
        """The whole conversation, to be kept."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        fields = {"model": self.model, "settings": self.settings, "messages": [*system, *self.turns]}
        return json.dumps(fields, indent=2, ensure_ascii=False)
