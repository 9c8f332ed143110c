"""Turns text and chats into token ids and back, with the paths and fields that vLLM has for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from peerd.api.chats import Chats
from peerd.api.fields import Fields
from peerd.api.openai.requests import ChatRequest, is_token_ids, read_chat
from peerd.api.translation import Translation

if TYPE_CHECKING:
    from peerd.client.model import SwarmModel

_OF_CHATS = (
    "add_generation_prompt",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "messages",
    "tools",
)


class TokensApi:
    """Answers /tokenize and /detokenize."""

    def __init__(self, chats: Chats) -> None:
        self._chats = chats

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    async def tokenize(self, request: Request) -> Response:
        name, wanted, special, shows_texts = await self._chats.read(request, self._read_text)
        model = self._chats.models.named(name)
        if isinstance(wanted, str):
            ids = await model.tokenize(wanted, add_special_tokens=special)
        else:
            ids = await self._chats.prompt(wanted)
        texts = await model.in_thread(model.tokenizer.convert_ids_to_tokens, ids) if shows_texts else None
        return JSONResponse(
            {"count": len(ids), "max_model_len": model.facts.max_length, "tokens": ids, "token_strs": texts}
        )

    async def detokenize(self, request: Request) -> Response:
        name, ids = await self._chats.read(request, self._read_ids)
        model = self._chats.models.named(name)
        return JSONResponse({"prompt": await model.in_thread(_decoded, model, ids)})

    def _read_text(self, fields: Fields) -> tuple[str, str | ChatRequest, bool, bool]:
        name, shows_texts = self._name(fields), fields.boolean("return_token_strs")
        if fields.take("messages") is None:
            prompt = fields.required_text("prompt")
            special = fields.boolean("add_special_tokens") or fields.take("add_special_tokens") is None
            fields.refuse_others()
            return name, prompt, special, shows_texts
        translation = Translation()
        translation.put("model", name)
        translation.copy(fields, *_OF_CHATS)
        fields.refuse_others()
        return name, translation.read(read_chat), False, shows_texts

    def _read_ids(self, fields: Fields) -> tuple[str, list[int]]:
        name, ids = self._name(fields), fields.take("tokens")
        fields.refuse_others()
        if ids != [] and not is_token_ids(ids):
            raise fields.error("tokens", "must be a list of token ids", code="invalid_value")
        size = self._chats.models.named(name).vocab_size
        if ids and max(ids) >= size:
            raise fields.error("tokens", f"has {max(ids)}, which is not one of the model's {size} tokens")
        return name, ids

    def _name(self, fields: Fields) -> str:
        """The model's name, which may be left out where there is only one."""
        names = [name for name, _ in self._chats.models]
        if fields.take("model") is None and len(names) == 1:
            return names[0]
        return fields.required_text("model")


def _decoded(model: SwarmModel, ids: list[int]) -> str:
    return str(model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
