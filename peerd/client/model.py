"""A model of a swarm as an application uses it: the client has its head and tokenizer, and servers have its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from peerd.client.blocks import Adapter, ModelFacts, ServedBlocks
from peerd.client.finding.finder import FRESH_S, ChainFinder, Patience
from peerd.client.grammars.compiling import GrammarCompiler
from peerd.client.session.kept_sessions import AnswerSession, KeptSessions, Shape, roomy_length
from peerd.client.session.opener import ChainOpener
from peerd.client.speculation.speculation import Speculation
from peerd.client.token_bytes import TokenBytes
from peerd.exchange.head_task import HeadTask
from peerd.protocol.errors import ContextTooLong, InvalidRequest, NotServed
from peerd.routing.directory.directory import CACHE_S

if TYPE_CHECKING:
    import torch

    from peerd.client.audits.auditor import Auditor
    from peerd.client.finding.scout import Scout
    from peerd.client.generation import Generation
    from peerd.client.grammars.checking import GrammarCheck
    from peerd.client.grammars.grammar import Grammar
    from peerd.client.grammars.vocabulary import CompiledGrammar
    from peerd.client.picked import TokenLogprobs
    from peerd.client.sampling import SamplingParams
    from peerd.client.training.span_lane import SpanLane
    from peerd.compute.checkpoint.hub.settings import HubSettings
    from peerd.compute.model.head import Head
    from peerd.protocol.identity import PeerId
    from peerd.protocol.messages.span_training import SpanBegin

__all__ = ["Adapter", "ModelFacts", "SwarmModel"]

T = TypeVar("T")

# Texts that are tokenized at the same time. Each takes a core, and a megabyte takes seconds.
_TOKENIZED_AT_ONCE = 2
# Prompts that are scored at the same time, and positions of each. Each position takes half a megabyte of logits.
_SCORING_AT_ONCE = 2
_SCORED_AT_ONCE = 32
# A token of some vocabulary may stand for more characters than its own text has.
_LEAST_LONGEST_TOKEN = 16


class SwarmModel(ServedBlocks):
    """One model of a swarm, with its head and tokenizer in this process. Made by `Peer.model`."""

    def __init__(
        self,
        facts: ModelFacts,
        head: HeadTask,
        tokenizer: Any,
        generation_config: Any,
        finder: ChainFinder,
        opener: ChainOpener,
        tasks: trio.Nursery,
        scout: Scout | None = None,
        hub: HubSettings | None = None,
        auditor: Auditor | None = None,
        grammar_check: GrammarCheck | None = None,
        *,
        remote_head: bool = False,
    ) -> None:
        """`grammar_check`: where grammars are compiled first, in case that they never end; None for trusted ones.
        `remote_head`: have last hops draw tokens where they can.
        """
        super().__init__(facts, finder, opener, tasks, scout, hub, auditor)
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self._head = head
        self._is_remote = remote_head
        #: What the answers of this model share to guess tokens ahead; None if they never do.
        self.speculation: Speculation | None = Speculation()
        #: Sessions of answers that have ended, for prompts that begin as they do; None if sessions end with answers.
        self.kept: KeptSessions | None = None
        self._token_bytes = TokenBytes(tokenizer)
        self._tokenizing = trio.CapacityLimiter(_TOKENIZED_AT_ONCE)
        self._scoring = trio.CapacityLimiter(_SCORING_AT_ONCE)
        self._grammars = GrammarCompiler(head, tokenizer, self._token_bytes, grammar_check)

    @property
    def head(self) -> Head:
        """The embeddings, the final norm and the LM head, for what runs beside the answers."""
        return self._head.head

    def keep_sessions(self, positions: int) -> None:
        """Keep the sessions of answers from now on, of at most so many positions in all (KV on each server)."""
        self.kept = KeptSessions(positions, self._tasks)

    async def start_answer(
        self,
        prompt: Sequence[int],
        *,
        max_length: int,
        max_rows: int = 1,
        max_rollback: int = 0,
        prompt_length: int = 0,
        adapter: Adapter | None = None,
        patience: Patience | None = None,
        head: bool = False,
    ) -> AnswerSession:
        """A session for an answer to `prompt`: a kept one that has its beginning, or a new one. For the other arguments
        see `session` and `start_session`. The caller gives it to `end_answer`. With an empty prompt it is a new one,
        which is not kept.
        """
        start = partial(self.start_session, prompt_length=prompt_length, patience=patience, head=head)
        # The ropes of some models depend on the first prompt's length; and an adapter's name may change its meaning.
        is_keepable = bool(prompt) and max_rows == 1 and adapter is None and not self.facts.ropes_follow_length
        if self.kept is None or not is_keepable:
            session = await start(max_length=max_length, max_rows=max_rows, max_rollback=max_rollback, adapter=adapter)
            return AnswerSession(session, 0, None)
        if (taken := self.kept.take(list(prompt), Shape(max_length, max_rollback, head))) is not None:
            self._watch(taken.session)
            return taken
        offers = await self._tools.finder.offers(CACHE_S)
        max_length = roomy_length(max_length, min(self.facts.max_length, self.kept.budget), offers)
        # Without windows it costs nothing, and chats are edited anywhere.
        shape = Shape(max_length, max_rollback if self.facts.limits_rollback else max_length, head)
        session = await start(max_length=shape.max_length, max_rollback=shape.max_rollback)
        return AnswerSession(session, 0, shape)

    def end_answer(self, answer: AnswerSession, ids: Sequence[int]) -> None:
        """Keep the session of an answer if it can serve another one, or close it. `ids`: what its row has computed."""
        if self.kept is None or answer.shape is None or not ids:
            answer.session.close()
        else:
            self.kept.keep(answer.session, ids, answer.shape)

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function that computes for long in a worker thread, so that the event loop goes on."""
        return await self._head.in_thread(function, *arguments)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids, in a worker thread.

        Raises ContextTooLong, without tokenizing it, for a text that is longer than the model's longest token in all
        its positions.
        """
        if len(text) > self.facts.max_length * _LEAST_LONGEST_TOKEN:
            await self._head.in_thread(self._check_length, text)

        def encode() -> list[int]:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

        return await self._head.in_thread(encode, limiter=self._tokenizing)

    def _check_length(self, text: str) -> None:
        most = self.facts.max_length * self._longest_token
        if len(text) > most:
            raise ContextTooLong(
                f"the text has {len(text)} characters; {self.facts.name} takes {self.facts.max_length} tokens of at"
                f" most {self._longest_token} characters: shorten it"
            )

    @cached_property
    def _longest_token(self) -> int:
        return max(_LEAST_LONGEST_TOKEN, *map(len, self.tokenizer.get_vocab()))

    def embed(self, token_ids: Sequence[int], start: int = 0) -> torch.Tensor:
        """Turn token ids into the first block's input, `[n, width]`, for the positions from `start` on.

        Some models (GPT-2, OPT) embed a token by its position too: give the same `start` as in the step. Raises
        InvalidRequest for ids and positions that the model does not have.
        """
        return self._head.embed(token_ids, start)

    async def logits(self, hidden: torch.Tensor, most: int | None = None) -> torch.Tensor:
        """Turn the last block's output, `[n, width]`, into float32 logits, `[n, vocabulary]`.

        With `most`, only the `most` largest of each position must be right, and the others may be smaller than they
        are: over a large vocabulary that is several times faster.
        """
        return await self._head.logits(hidden, most)

    async def last_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn the last block's output, `[n, width]`, into float32 after the final norm, as Transformers'
        `last_hidden_state`.
        """
        return await self._head.last_hidden(hidden)

    async def score(self, hidden: torch.Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprobs]:
        """The log-probability of each token after the last block's output before it, `[n, width]`; see `Decoding`."""
        from peerd.client.choosing import logprobs_of_all

        found: list[TokenLogprobs] = []
        async with self._scoring:
            for start in range(0, len(token_ids), _SCORED_AT_ONCE):
                part = slice(start, start + _SCORED_AT_ONCE)
                logits = await self.logits(hidden[part])
                found += await self.in_thread(logprobs_of_all, logits, token_ids[part], top)
        return found

    async def loss(self, hidden: torch.Tensor, texts: Sequence[Sequence[int]]) -> tuple[float, torch.Tensor]:
        """The mean loss of predicting each text's tokens from the second on, and its gradient.

        `hidden` is the last block's output for the packed texts, `[sum of their lengths, width]`, and so is the
        gradient.
        """
        import torch

        whole = torch.zeros(hidden.shape)
        predicting = torch.ones(len(hidden), dtype=torch.bool)
        predicting[torch.tensor([len(text) for text in texts]).cumsum(0) - 1] = False
        targets = torch.tensor([token for text in texts for token in text[1:]])
        loss, whole[predicting] = await self._head.loss(hidden[predicting], targets)
        return loss, whole

    async def open_span(self, begin: SpanBegin, peer: PeerId | None = None) -> SpanLane:
        """Open a copy of a span for training, on `peer` or on the first peer that allows it. Raises NotServed, and the
        error with which the peers refuse.
        """
        from peerd.client.training.span_lane import open_span_lane

        give_up_at = trio.current_time() + Patience().missing_s
        max_age_s = CACHE_S
        while True:
            offers = await self._tools.finder.offers(max_age_s)
            wanted = [offer for offer in offers if peer in (None, offer.peer_id)]
            try:
                return await open_span_lane(self._tools.opener.connections, wanted, begin, self.facts.width)
            except NotServed:
                if trio.current_time() >= give_up_at:
                    raise
                # A server that has just started may be announced meanwhile.
                max_age_s = FRESH_S
                await trio.sleep(FRESH_S)

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Turn text into token ids; with `chat`, as a user's turn in the model's template. Raises InvalidRequest."""
        if chat and not self.tokenizer.chat_template:
            raise InvalidRequest(f"{self.facts.name} has no chat template; leave out --chat")
        if chat:
            turn = [{"role": "user", "content": prompt}]
            rendered = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer.encode(rendered, add_special_tokens=False)
        else:
            ids = self.tokenizer.encode(prompt)
        return list(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn token ids into text, without special tokens."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self._head.vocab_size

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character."""
        return self._token_bytes.of(token_id)

    async def prepare_grammars(self) -> None:
        """Do now what the first grammar would wait for, and what would stop the event loop for a second or two then."""
        await self._grammars.prepare()

    async def compiled(self, grammar: Grammar) -> CompiledGrammar:
        """A grammar over the model's tokens, compiled in a worker thread, one at a time.

        The model's first one takes a second longer. Raises InvalidRequest, which says what is wrong with the grammar.
        """
        return await self._grammars.compiled(grammar)

    def sampling_params(self, **asked: Any) -> SamplingParams:
        """`SamplingParams` with these values, and the model's own for others. Raises ValueError, InvalidRequest."""
        from peerd.client.sampling import SamplingParams

        params = SamplingParams.from_config(self.generation_config, **asked)
        for token, _ in params.logit_bias:
            if token >= self.vocab_size:
                raise InvalidRequest(f"logit_bias: token {token} is not one of the model's {self.vocab_size}")
        return params

    @property
    def remote_vocab(self) -> int | None:
        """How many token ids there are, if last hops are to draw tokens where they can; else None."""
        return self.vocab_size if self._is_remote else None

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        chat: bool = False,
        adapter: Adapter | None = None,
        speculate: bool = True,
        **sampling: Any,
    ) -> Generation:
        """Generate an answer: `async for token in model.generate("Once", max_new_tokens=20): ...`.

        `adapter` is what `session` takes. Unless `speculate` is False, steps also carry guesses of the next tokens
        where that is faster; the tokens are the same. `sampling` takes the fields of `SamplingParams`; those left out
        come from the model's own generation config. This raises InvalidRequest or ValueError; iterating raises NoChain,
        Overloaded and AdapterError.
        """
        from peerd.client.generation import Generation

        ids = self.encode(prompt, chat=chat) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise InvalidRequest("the prompt is empty")
        speculation = self.speculation if speculate else None
        return Generation(self, ids, self.sampling_params(**sampling), adapter, speculation)
