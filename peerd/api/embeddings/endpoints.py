"""The endpoints for embeddings: OpenAI's, and Ollama's two."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from peerd.api.chats import Chats
from peerd.api.embeddings.pooling import mean_pooled
from peerd.api.embeddings.requests import (
    MAX_TOKENS,
    EmbeddingRequest,
    read_embed,
    read_embedding,
    read_older_embed,
)
from peerd.api.errors import ApiError, invalid
from peerd.api.fields import Fields
from peerd.api.openai.answers import encode_prompt
from peerd.api.openai.responses import ComputedResponse
from peerd.api.translation import Translation

if TYPE_CHECKING:
    import torch

    from peerd.client.model import SwarmModel

# Their JSON takes some 80 MB.
_MOST_NUMBERS = 2**22

Shape = Callable[[EmbeddingRequest, "torch.Tensor", int, float], dict[str, Any]]
"""Makes the body of the request, its vectors, the number of its tokens and the seconds that it took."""


class EmbeddingsApi:
    """Answers with vectors."""

    def __init__(self, chats: Chats) -> None:
        self._chats = chats

    def routes(self) -> list[Route]:
        """The paths."""
        paths: list[tuple[str, Callable[[Fields], EmbeddingRequest], Shape]] = [
            ("/v1/embeddings", read_embedding, _openai_s),
            ("/api/embed", read_embed, _ollama_s),
            ("/api/embeddings", read_older_embed, _ollama_s_older),
        ]
        return [Route(path, partial(self._answer, read, shape), methods=["POST"]) for path, read, shape in paths]

    async def _answer(self, read: Callable[[Fields], EmbeddingRequest], shape: Shape, request: Request) -> Response:
        wanted = await self._chats.read(request, read)
        model = self._chats.models.named(wanted.model)
        if len(wanted.inputs) * model.facts.width > _MOST_NUMBERS:
            most = _MOST_NUMBERS // model.facts.width
            raise invalid(f"{wanted.name} has more than {most} texts, the most for this model", wanted.name)
        return ComputedResponse(partial(_respond, model, wanted, shape), self._chats.answering)


async def _respond(model: SwarmModel, wanted: EmbeddingRequest, shape: Shape) -> Response:
    began = trio.current_time()
    texts = await _encoded(model, wanted)
    vectors = await mean_pooled(model, texts)
    took_s = trio.current_time() - began

    def written() -> bytes:
        return json.dumps(shape(wanted, vectors, sum(map(len, texts)), took_s)).encode()

    return Response(await model.in_thread(written), media_type="application/json")


async def _encoded(model: SwarmModel, wanted: EmbeddingRequest) -> list[Sequence[int]]:
    """The token ids of each text. Raises ApiError, ContextTooLong."""
    texts: list[Sequence[int]] = []
    total = 0
    for number, given in enumerate(wanted.inputs):
        path = wanted.path(number)
        naming = Translation()
        naming.rename("prompt", path)
        with naming.naming():
            ids = await encode_prompt(model, given)
        total += len(ids)
        if len(ids) > model.facts.max_length:
            problem = f"{path} has {len(ids)} tokens, and the model takes {model.facts.max_length}"
            raise ApiError(400, problem, param=path, code="context_length_exceeded")
        if total > MAX_TOKENS:
            raise invalid(f"{wanted.name} has more than {MAX_TOKENS} tokens in all: ask several times", wanted.name)
        texts.append(ids)
    return texts


def _openai_s(wanted: EmbeddingRequest, vectors: torch.Tensor, tokens: int, took_s: float) -> dict[str, Any]:
    if wanted.as_base64:
        # Little-endian float32, as OpenAI's.
        shown: list[Any] = [base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() for vector in vectors]
    else:
        shown = vectors.tolist()
    data = [{"object": "embedding", "index": number, "embedding": vector} for number, vector in enumerate(shown)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": wanted.model, "usage": usage}


def _ollama_s(wanted: EmbeddingRequest, vectors: torch.Tensor, tokens: int, took_s: float) -> dict[str, Any]:
    return {
        "model": wanted.model,
        "embeddings": vectors.tolist(),
        "total_duration": int(took_s * 1_000_000_000),
        "load_duration": 0,
        "prompt_eval_count": tokens,
    }


def _ollama_s_older(wanted: EmbeddingRequest, vectors: torch.Tensor, tokens: int, took_s: float) -> dict[str, Any]:
    return {"embedding": vectors[0].tolist()}
