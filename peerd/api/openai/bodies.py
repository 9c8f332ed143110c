"""The JSON of answers in OpenAI's format, complete and in pieces.

A shape belongs to one request, because its id and time are in every piece.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from peerd.api.openai.echoes import Echo
from peerd.client.picked import Picked, TokenLogprobs
from peerd.client.token_bytes import shown

BytesOf = Callable[[int], bytes]
"""The bytes of a token, which may be a part of a character."""


class ChatShape:
    """The answers of /v1/chat/completions."""

    def __init__(self, model: str, bytes_of: BytesOf) -> None:
        self._model = model
        self._bytes_of = bytes_of
        self.answer_id = f"chatcmpl-{uuid.uuid4().hex}"
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
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

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
    """The answers of /v1/completions. `echoes`: the prompts with which the answers begin.

    With `only_prompts`, the tokens that were drawn are left out: nothing but the prompts' log-probabilities was wanted.
    """

    def __init__(self, model: str, bytes_of: BytesOf, echoes: Sequence[Echo], *, only_prompts: bool = False) -> None:
        self._model = model
        self._bytes_of = bytes_of
        self._echoes = echoes
        self.answer_id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._only_prompts = only_prompts
        self._offsets = [len(echo.text) for echo in echoes]

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first piece of an answer, if the prompt is echoed. Log-probabilities of it come with the first token."""
        echo = self._echoes[index]
        if not echo.text or echo.ids:
            return None
        return self._frame([self._choice(index, echo.text, None, None)])

    def piece(self, picked: Picked) -> dict[str, Any]:
        """The piece for one token."""
        begins = picked.prompt is not None
        return self._frame([self._answer(picked.row, [picked], self._echoes[picked.row].text if begins else "")])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece, if the client asked for usage."""
        return self._frame([]) | {"usage": usage}

    def chain(self, chain: dict[str, Any]) -> dict[str, Any]:
        """A piece without text that names the peers that compute the answer from here on."""
        return self._frame([]) | {"peerd": chain}

    def whole(self, answers: Sequence[Sequence[Picked]], usage: dict[str, int]) -> dict[str, Any]:
        """All answers in one body."""
        choices = [self._answer(index, picks, self._echoes[index].text) for index, picks in enumerate(answers)]
        return self._frame(choices) | {"usage": usage}

    def _answer(self, index: int, picks: Sequence[Picked], before: str) -> dict[str, Any]:
        """What these tokens say, and the text before them."""
        logprobs, finish = self._logprobs(picks), picks[-1].finish
        if self._only_prompts:
            return self._choice(index, before, logprobs, "length")
        return self._choice(index, before + _text(picks), logprobs, finish)

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _logprobs(self, picks: Sequence[Picked]) -> dict[str, Any] | None:
        if picks[0].logprobs is None:
            return None
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        echo = self._echoes[picks[0].row]
        for token, logprobs, offset in zip(echo.ids, picks[0].prompt or (), echo.offsets, strict=False):
            self._add(lists, token, logprobs, offset)
        for picked in () if self._only_prompts else picks:
            self._add(lists, picked.id, picked.logprobs, self._offsets[picked.row])
            self._offsets[picked.row] += len(picked.text)
        return lists

    def _add(self, lists: dict[str, list[Any]], token_id: int, logprobs: TokenLogprobs | None, offset: int) -> None:
        lists["tokens"].append(self._shown(token_id))
        lists["text_offset"].append(offset)
        if logprobs is None:
            # A prompt's first token, which nothing predicts.
            lists["token_logprobs"].append(None)
            lists["top_logprobs"].append(None)
            return
        # As in OpenAI's API, the chosen token is among the likeliest ones even if it is none of them.
        top = dict(logprobs.top) | {token_id: logprobs.logprob}
        lists["token_logprobs"].append(logprobs.logprob)
        lists["top_logprobs"].append({self._shown(token): value for token, value in top.items()})

    def _shown(self, token_id: int) -> str:
        return shown(self._bytes_of(token_id))


Shape = ChatShape | CompletionShape


def _text(picks: Sequence[Picked]) -> str:
    return "".join(picked.text for picked in picks)
