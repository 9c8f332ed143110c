"""Runs the model for a request: checks sizes, and returns the tokens of all answers as one stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import trio

from peerd.api.errors import ApiError, invalid
from peerd.api.openai.grammar_fields import refused
from peerd.api.openai.requests import CHAT_TOKENS, CommonFields
from peerd.client.decoding import Decoding
from peerd.client.finding.finder import Patience
from peerd.client.picked import Picked
from peerd.client.sampling import SamplingParams
from peerd.protocol.errors import InvalidRequest, PeerdError
from peerd.trio_tools import open_tasks

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from peerd.client.grammars.vocabulary import CompiledGrammar
    from peerd.client.model import SwarmModel

# How many tokens may wait for a client that reads slowly; then its session waits too.
_AHEAD = 16
# A program that asks waits for this long until the peers have room for its answer, without a sign of life. Then it is
# told when to ask again, within ten seconds in all; a hop may be asked just before this is over.
_PATIENCE = Patience(first_busy_s=6.0)


@dataclass(slots=True)
class Usage:
    """The tokens of the prompts, and of the answers so far. `cached_tokens` of the prompts had been computed before."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answers:
    """All answers to a request's prompts: `common.rows` answers to each prompt, numbered prompt by prompt."""

    def __init__(
        self,
        model: SwarmModel,
        common: CommonFields,
        prompts: Sequence[Sequence[int]],
        on_token: Callable[[], None] = lambda: None,
        decode: Callable[[Sequence[int]], str] | None = None,
        grammar: CompiledGrammar | None = None,
        *,
        scores_prompts: bool = False,
    ) -> None:
        """`on_token` is called for each token of an answer. `decode` turns ids into text in place of the model's way.
        `grammar` is the request's. `scores_prompts`: whether the prompts' log-probabilities are wanted too.

        Raises ApiError if a prompt does not fit, before any peer is asked.
        """
        self.usage = Usage(sum(map(len, prompts)))
        #: When the first token came, by Trio's clock; None before it.
        self.first_token_at: float | None = None
        self._common = common
        self._on_token = on_token
        self._decodings = [
            Decoding(
                model,
                prompt,
                _sampling(model, common, len(prompt)),
                rows=common.rows,
                stop=common.stop,
                top_logprobs=common.top_logprobs,
                speculation=model.speculation,
                patience=_PATIENCE,
                hidden_ends=common.stop_token_ids,
                decode=decode,
                grammar=grammar,
                prompt_logprobs=common.top_logprobs if scores_prompts else None,
            )
            for prompt in prompts
        ]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[AsyncGenerator[Picked, None]]:
        """The tokens of all answers as they come; `row` is the answer's number. Leaving the context ends the answers.

        Iterating raises PeerdError.
        """
        async with open_tasks() as tasks:
            send, receive = trio.open_memory_channel[Picked | PeerdError](_AHEAD)
            async with send:
                for number, decoding in enumerate(self._decodings):
                    tasks.start_soon(self._run, decoding, number * self._common.rows, send.clone())
            async with aclosing(self._counted(receive)) as tokens:
                yield tokens

    def chain(self) -> dict[str, Any]:
        """Which peers compute the first prompt's answers now, and how often one was replaced."""
        session = self._decodings[0].session
        if session is None:
            return {"chain": [], "failovers": 0}
        hops = [{"peer": str(hop.peer), "start": hop.span.start, "end": hop.span.end} for hop in session.chain]
        return {"chain": hops, "failovers": session.failovers}

    async def _run(self, decoding: Decoding, first: int, send: trio.MemorySendChannel[Picked | PeerdError]) -> None:
        async with send, aclosing(decoding.tokens()) as tokens:
            try:
                async for picked in tokens:
                    await send.send(replace(picked, row=first + picked.row))
            except PeerdError as error:
                # Several answers may fail for one reason; the caller is told once.
                await send.send(error)

    async def _counted(self, receive: trio.MemoryReceiveChannel[Picked | PeerdError]) -> AsyncGenerator[Picked, None]:
        async for picked in receive:
            if isinstance(picked, PeerdError):
                raise picked
            if self.first_token_at is None:
                self.first_token_at = trio.current_time()
            self.usage.cached_tokens = sum(decoding.cached for decoding in self._decodings)
            if self._common.max_tokens != 0:
                self.usage.completion_tokens += 1
                self._on_token()
            yield picked


async def encode_prompt(model: SwarmModel, prompt: str | list[int]) -> list[int]:
    """A prompt's token ids. Raises ApiError, ContextTooLong."""
    ids = await model.tokenize(prompt) if isinstance(prompt, str) else prompt
    if not ids:
        raise invalid("prompt is empty", "prompt")
    if max(ids) >= model.vocab_size:
        raise invalid(
            f"prompt: token {max(ids)} is not one of the model's {model.vocab_size}", "prompt", code="invalid_value"
        )
    return ids


async def compiled_grammar(model: SwarmModel, common: CommonFields) -> CompiledGrammar | None:
    """The grammar that the request asks for. Raises ApiError."""
    if common.grammar is None:
        return None
    try:
        return await model.compiled(common.grammar.grammar)
    except InvalidRequest as error:
        raise refused(common.grammar, str(error)) from None


def _defaults(config: GenerationConfig) -> dict[str, float]:
    """OpenAI's defaults for what the model's own generation config does not say: Transformers' are others."""
    defaults: dict[str, float] = {}
    if config.do_sample is None:
        defaults["temperature"] = 1.0 if config.temperature is None else config.temperature
    if config.top_k is None:
        defaults["top_k"] = 0
    return defaults


def _sampling(model: SwarmModel, common: CommonFields, prompt_tokens: int) -> SamplingParams:
    limit = model.facts.max_length
    room = limit - prompt_tokens
    wanted = common.max_tokens if common.max_tokens is not None else min(CHAT_TOKENS, room)
    # To score a prompt, a token is drawn and left out.
    wanted = max(wanted, 1)
    if wanted > room:
        raise ApiError(
            400,
            f"This model's maximum context length is {limit} tokens. However, you requested"
            f" {prompt_tokens + wanted} tokens ({prompt_tokens} in the prompt, {wanted} in the"
            " completion). Reduce the length of the prompt or of the completion.",
            code="context_length_exceeded",
        )
    try:
        own = () if common.ignore_eos else model.sampling_params().eos_token_ids
        ends = (*own, *common.stop_token_ids)
        sampling = {name: value for name, value in common.sampling.items() if value is not None}
        sampling = _defaults(model.generation_config) | sampling
        grammar = None if common.grammar is None else common.grammar.grammar
        return model.sampling_params(max_new_tokens=wanted, eos_token_ids=ends, grammar=grammar, **sampling)
    except ValueError as error:
        raise invalid(str(error)) from None
    except InvalidRequest as error:
        raise invalid(str(error), "logit_bias") from None
