"""The JSON of answers in OpenAI's format, complete and in pieces.

A shape belongs to one request, because its id and time are in every piece.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from peerd.client.picked import Picked
from peerd.client.token_bytes import shown

BytesOf = Callable[[int], bytes]
"""The bytes of a token, which may be a part of a character."""


class ChatShape:
    """The answers of /v1/chat/completions."""

    def __init__(self, model: str, bytes_of: BytesOf) -> None:
        self._model = model
        self._bytes_of = bytes_of
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def opening(self, index: int) -> dict[str, Any]:
        """The first piece of an answer, which names the role."""
        return self._chunk([self._choice(index, {"role": "assistant", "content": ""})])

    def piece(self, picked: Picked) -> dict[str, Any]:
        """The piece for one token."""
        delta = {"content": picked.text} if picked.text or picked.finish is None else {}
        choice = self._choice(picked.row, delta)
        choice["finish_reason"] = picked.finish
        if picked.logprobs is not None:
            choice["logprobs"] = {"content": [self._logprob(picked)], "refusal": None}
        return self._chunk([choice])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece, if the client asked for usage."""
        return self._chunk([]) | {"usage": usage}

    def chain(self, chain: dict[str, Any]) -> dict[str, Any]:
        """A piece without text that names the peers that compute the answer from here on."""
        return self._chunk([]) | {"peerd": chain}

    def whole(self, answers: Sequence[Sequence[Picked]], usage: dict[str, int]) -> dict[str, Any]:
        """All answers in one body."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": _text(picks), "refusal": None},
                "logprobs": self._logprobs(picks),
                "finish_reason": picks[-1].finish,
            }
            for index, picks in enumerate(answers)
        ]
        return self._frame("chat.completion", choices) | {"usage": usage}

    def _choice(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._frame("chat.completion.chunk", choices)

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _logprobs(self, picks: Sequence[Picked]) -> dict[str, Any] | None:
        if picks[0].logprobs is None:
            return None
        return {"content": [self._logprob(picked) for picked in picks], "refusal": None}

    def _logprob(self, picked: Picked) -> dict[str, Any]:
        assert picked.logprobs is not None
        top = [self._token(token_id, logprob) for token_id, logprob in picked.logprobs.top]
        return self._token(picked.id, picked.logprobs.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._bytes_of(token_id)
        return {"token": shown(data), "logprob": logprob, "bytes": list(data)}


class CompletionShape:
    """The answers of /v1/completions. `echoes`: the texts with which the answers begin."""

    def __init__(self, model: str, bytes_of: BytesOf, echoes: Sequence[str]) -> None:
        self._model = model
        self._bytes_of = bytes_of
        self._echoes = echoes
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._offsets = [len(echo) for echo in echoes]

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first piece of an answer, if the prompt is echoed."""
        if not self._echoes[index]:
            return None
        return self._frame([self._choice(index, self._echoes[index], None, None)])

    def piece(self, picked: Picked) -> dict[str, Any]:
        """The piece for one token."""
        return self._frame([self._choice(picked.row, picked.text, self._logprobs([picked]), picked.finish)])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece, if the client asked for usage."""
        return self._frame([]) | {"usage": usage}

    def chain(self, chain: dict[str, Any]) -> dict[str, Any]:
        """A piece without text that names the peers that compute the answer from here on."""
        return self._frame([]) | {"peerd": chain}

    def whole(self, answers: Sequence[Sequence[Picked]], usage: dict[str, int]) -> dict[str, Any]:
        """All answers in one body."""
        choices = [
            self._choice(index, self._echoes[index] + _text(picks), self._logprobs(picks), picks[-1].finish)
            for index, picks in enumerate(answers)
        ]
        return self._frame(choices) | {"usage": usage}

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _logprobs(self, picks: Sequence[Picked]) -> dict[str, Any] | None:
        if picks[0].logprobs is None:
            return None
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for picked in picks:
            assert picked.logprobs is not None
            # As in OpenAI's API, the chosen token is among the likeliest ones even if it is none of them.
            top = dict(picked.logprobs.top) | {picked.id: picked.logprobs.logprob}
            lists["tokens"].append(self._shown(picked.id))
            lists["token_logprobs"].append(picked.logprobs.logprob)
            lists["top_logprobs"].append({self._shown(token): value for token, value in top.items()})
            lists["text_offset"].append(self._offsets[picked.row])
            self._offsets[picked.row] += len(picked.text)
        return lists

    def _shown(self, token_id: int) -> str:
        return shown(self._bytes_of(token_id))


Shape = ChatShape | CompletionShape


def _text(picks: Sequence[Picked]) -> str:
    return "".join(picked.text for picked in picks)
