"""The loop from logits to tokens, for one prompt and any number of answers to it.

The answers are rows of one session: the prompt is computed once and shared, and each step carries the next token of
every row that is not finished, and guesses after it where that pays (`speculation`). The loop can continue after an
error. A step that failed had no effect, so the next action is kept until it has succeeded.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, nullcontext
from typing import TYPE_CHECKING

import torch

from peerd.client.answer_meter import AnswerMeter
from peerd.client.choosing import Choice, Chooser
from peerd.client.picked import Finish, Picked, PromptLogprobs
from peerd.client.remote_head import RemoteHead, can_be_remote
from peerd.client.sampling import SamplingParams
from peerd.client.speculation.speculation import Speculation, Speculator
from peerd.client.steps.rows import Row, RowAnswer
from peerd.client.steps.stepping import Stepping
from peerd.client.text_stream import StopFilter, TextStream
from peerd.client.token_model import TokenModel
from peerd.protocol.errors import NoChain, Overloaded, PeerdError
from peerd.protocol.messages.session import Want
from peerd.protocol.rows import Drop, Fork, Op

if TYPE_CHECKING:
    from peerd.client.blocks import Adapter
    from peerd.client.finding.finder import Patience
    from peerd.client.grammars.vocabulary import CompiledGrammar
    from peerd.client.session.kept_sessions import AnswerSession
    from peerd.client.session.session import Session
    from peerd.protocol.messages.drawing import TokenPairs


OnHidden = Callable[[int, int, torch.Tensor], None]
"""Takes a row, a position, and what the last block gave out, `[n, width]`, for tokens of the row from there on."""


class Decoding:
    """Answers to `prompt` while they are generated: iterate over `tokens`.

    `stop` texts end a row, and are left out of its text. `top_logprobs` asks for logprobs with that many alternatives.
    `adapter` and `patience` are what `SwarmModel.session` takes. With `speculation`, steps carry guesses too; the
    tokens are the same. `resumable` needs a single row: after NoChain or Overloaded the caller may call `tokens` again.
    It continues with the same session if that still exists, which is kept for a while, and otherwise with a new one.
    `hidden_ends`: tokens among those that end an answer whose text is left out, though it may be ordinary. `decode`
    turns ids into text in place of the model's own way. `grammar` is the sampling's, if it is compiled already. With
    `prompt_logprobs`, the first token of each row brings those of the prompt, with that many alternatives. Where the
    model wants the last hop's head (`TokenModel.remote_vocab`), that draws what it can; otherwise `on_hidden` is told
    the hidden states of each row, from the prompt's last position on.
    """

    def __init__(
        self,
        model: TokenModel,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        resumable: bool = False,
        rows: int = 1,
        stop: Sequence[str] = (),
        top_logprobs: int | None = None,
        adapter: Adapter | None = None,
        speculation: Speculation | None = None,
        patience: Patience | None = None,
        hidden_ends: Collection[int] = (),
        decode: Callable[[Sequence[int]], str] | None = None,
        grammar: CompiledGrammar | None = None,
        prompt_logprobs: int | None = None,
        on_hidden: OnHidden | None = None,
    ) -> None:
        #: How many of the prompt's positions had been computed for an earlier answer.
        self.cached = 0
        self._held: AnswerSession | None = None
        self._model = model
        self._prompt = list(prompt)
        self._longest = len(prompt) + sampling.max_new_tokens
        self._sampling = sampling
        self._chooser = Chooser(len(prompt), sampling, top_logprobs)
        # How many of the largest logits must be right. A log-probability takes them all.
        self._most = sampling.deciding if top_logprobs is None else None
        self._adapter = adapter
        self._patience = patience
        self._hidden_ends = frozenset(hidden_ends)
        self._resumable = resumable
        self._grammar = grammar
        self._prompt_logprobs = prompt_logprobs
        self._on_hidden = on_hidden
        # The row operations of the next step, and the answers of the last one from which no token was drawn yet.
        self._ops: tuple[Op, ...] = ()
        self._answers: list[RowAnswer] = []
        self._dropped: tuple[Op, ...] = ()
        self._begun = False
        vocab = model.remote_vocab if prompt_logprobs is None and can_be_remote(sampling, top_logprobs, rows) else None
        self._remote = None if vocab is None else RemoteHead(sampling, len(prompt), top_logprobs, vocab)
        self._rows = [
            Row(number, TextStream(decode or model.decode), StopFilter(stop), list(prompt), len(prompt))
            for number in range(rows)
        ]
        self._speculator = None if speculation is None else speculation.answer(rows)
        self._meter = AnswerMeter(model.meters, self._speculator)
        self._stepping = Stepping(model, self._speculator, rows, self._most, self._room, self._remote)

    @property
    def speculator(self) -> Speculator | None:
        """What guesses tokens for this answer, with its figures. None where speculation is off."""
        return self._speculator

    async def tokens(self) -> AsyncGenerator[Picked, None]:
        """The tokens of all rows, as they come. Row 0 draws the tokens that a single answer would draw.

        Raises NoChain, Overloaded, ContextTooLong, InvalidRequest, BadResult. Close the generator to end the session,
        or to have it kept where the model keeps sessions.
        """
        waits = failed = False
        decoding = nullcontext() if self._speculator is None else self._speculator.decoding(self._prompt, self._longest)
        with self._meter.running():
            await self._constrain()
            if self.session is None or self.session.closed:
                # A single row can begin again from its prompt and its tokens so far: see `_run`.
                self._begun = False
                await self._start_session()
            try:
                with decoding:
                    async with aclosing(self._run()) as tokens:
                        async for picked in tokens:
                            yield picked
            except (NoChain, Overloaded):
                waits = self._resumable
                raise
            except PeerdError:
                failed = True
                raise
            finally:
                self._end_session(waits=waits, failed=failed)

    async def _constrain(self) -> None:
        """Give each row its grammar, if the answer has one."""
        if self._sampling.grammar is None or self._rows[0].constraint is not None:
            return
        grammar = self._grammar or await self._model.compiled(self._sampling.grammar)
        for row in self._rows:
            row.constraint = grammar.row(self._sampling.eos_token_ids)

    @property
    def session(self) -> Session | None:
        """The session that computes the answer, or did last; None before it has begun."""
        return None if self._held is None else self._held.session

    def _end_session(self, *, waits: bool, failed: bool) -> None:
        if waits:
            self._model.close_later(self._open_session)
        elif self._held is not None:
            # The last token was drawn, and never sent. A prompt that was scored is no chat's.
            lost = failed or not self._begun or self._prompt_logprobs is not None
            self._model.end_answer(self._held, () if lost else self._rows[0].context[:-1])

    async def _start_session(self) -> None:
        self._held = await self._model.start_answer(
            # To be scored, all of a prompt must be computed.
            self._rows[0].context if self._prompt_logprobs is None else (),
            max_length=self._longest,
            max_rows=len(self._rows),
            max_rollback=self._stepping.rollback,
            prompt_length=self._length if self._ropes_changed else len(self._prompt),
            adapter=self._adapter,
            patience=self._patience,
            head=self._remote is not None,
        )
        if not self._rows[0].count:
            self.cached = self._held.computed
            self._meter.prompt(len(self._prompt), self.cached)

    @property
    def _length(self) -> int:
        """The length of the longest row: the prompt and its tokens so far."""
        return max(len(row.context) for row in self._rows)

    @property
    def _ropes_changed(self) -> bool:
        """Whether the text is longer than what its ropes turn in the first way."""
        change = self._model.facts.ropes_change_at
        return change is not None and self._length > change

    async def _run(self) -> AsyncGenerator[Picked, None]:
        while True:
            live = [row for row in self._rows if not row.finished]
            if not live:
                return
            if not self._begun:
                self._answers = await self._begin(live)
            # Over a large vocabulary this takes tens of milliseconds for each token.
            choices = await self._chosen(self._answers)
            answers, self._answers = self._answers, []
            gained = 0
            for answer, chosen in zip(answers, choices, strict=True):
                start = len(answer.row.context) - 1
                for picked in self._accepted(answer, chosen):
                    gained += 1
                    yield picked
                if answer.hidden is not None:
                    self._computed(answer.row, start, answer.hidden[: len(chosen)])
            if answers:
                self._stepping.note(gained)
                # Only with the next step: row 0 may end before the other rows have forked from it.
                self._dropped = tuple(Drop(answer.row.number) for answer in answers if answer.row.finished)
                continue
            if self._ropes_changed and self._length - 1 == self._model.facts.ropes_change_at:
                await self._begin_again()
                continue
            self._answers = await self._stepping.step(self._open_session, live, self._ops)
            self._ops, self._dropped = self._dropped, ()

    @property
    def _open_session(self) -> Session:
        assert self._held is not None
        return self._held.session

    async def _begin(self, live: Sequence[Row]) -> list[RowAnswer]:
        """Compute the prompt once for all rows, or each row's text if it has tokens already."""
        forked = [] if live[0].count else live[1:]
        ends: list[torch.Tensor | Sequence[TokenPairs]] = []
        prompt: PromptLogprobs | None = None
        top = None if live[0].count else self._prompt_logprobs
        want: Want = "last" if top is None else "all"
        for row in live[: len(live) - len(forked)]:
            # A kept session has only one row.
            start = self._held.computed if self._held is not None else 0
            embedded = await self._model.in_thread(self._model.embed, row.context[start:], start)
            if self._remote is not None:
                rows = [each.number for each in live] if forked else ()
                request = self._remote.request({row.number: row.context}, rows=rows)
                ends.append(await self._open_session.draw(embedded, request, row=row.number, start=start))
                continue
            async with self._meter.watching_prompt(self._open_session):
                hidden = await self._open_session.step(embedded, row=row.number, start=start, want=want)
            ends.append(hidden[-1:])
            if top is not None:
                prompt = (None, *await self._model.score(hidden[:-1], self._prompt[1:], top))
        parts = await self._first_parts(ends, len(live))
        self._begun = True
        self._stepping.begin()
        self._dropped = ()
        self._ops = tuple(Fork(0, row.number, len(self._prompt)) for row in forked)
        return [RowAnswer(row, (), *part, prompt) for row, part in zip(live, parts, strict=True)]

    async def _first_parts(
        self, ends: Sequence[torch.Tensor | Sequence[TokenPairs]], count: int
    ) -> list[tuple[torch.Tensor | None, torch.Tensor | Sequence[TokenPairs]]]:
        """The hidden states and logits from which the first tokens of `count` rows are drawn, or the tokens: `ends` are
        that of one row for all, or one of each.
        """
        if drawn := [pairs for end in ends if not isinstance(end, torch.Tensor) for pairs in end]:
            return [(None, [pairs]) for pairs in drawn]
        hidden = torch.cat([end for end in ends if isinstance(end, torch.Tensor)])
        logits = (await self._model.logits(hidden, self._most)).expand(count, -1)
        return list(zip(hidden.expand(count, -1)[:, None], logits[:, None], strict=True))

    async def _begin_again(self) -> None:
        """Continue in a session whose blocks have computed nothing yet."""
        self._open_session.close()
        self._begun = False
        await self._start_session()

    def _room(self, row: Row) -> int:
        """How many guesses a row's next step may carry. It gains a token more than it has right guesses."""
        room = self._sampling.max_new_tokens - row.count - 1
        change = self._model.facts.ropes_change_at
        if change is None or self._ropes_changed:
            return room
        # Rows must reach the change together; and positions beyond it are computed with the other ropes.
        return min(room, change - self._length) if len(self._rows) == 1 else 0

    def _accepted(self, answer: RowAnswer, chosen: Sequence[Choice]) -> Iterator[Picked]:
        """Take the chosen tokens, up to the one that ends the row."""
        for number, choice in enumerate(chosen):
            yield self._pick(answer.row, choice, None if number else answer.prompt)
            if answer.row.finished:
                return

    def _computed(self, row: Row, start: int, hidden: torch.Tensor) -> None:
        """Hand on the hidden states of tokens that are certain."""
        if self._speculator is not None:
            self._speculator.computed(start, hidden)
        if self._on_hidden is not None:
            self._on_hidden(row.number, start, hidden)

    async def _chosen(self, answers: Sequence[RowAnswer]) -> list[list[Choice]]:
        """The next tokens of each row."""
        if not any(isinstance(each.logits, torch.Tensor) for each in answers):
            return [self._choose(each) for each in answers]
        return await self._model.in_thread(lambda: [self._choose(each) for each in answers])

    def _choose(self, answer: RowAnswer) -> list[Choice]:
        """The next tokens of a row. Runs in a worker thread, unless they are drawn already."""
        if not isinstance(answer.logits, torch.Tensor):
            assert self._remote is not None
            return list(self._remote.choices(answer.logits, answer.draft))
        row = answer.row
        return list(
            self._chooser.choices(answer.logits, row.context, answer.draft, row=row.number, constraint=row.constraint)
        )

    def _pick(self, row: Row, choice: Choice, prompt: PromptLogprobs | None) -> Picked:
        token_id, ends, position = choice.token_id, choice.ends, len(row.context)
        row.context.append(token_id)
        self._meter.token(row.number)
        self._meter.chain(lambda: self._open_session.chain)
        if self._speculator is not None:
            self._speculator.came(row.number, token_id, position)
        final = ends or row.count == self._sampling.max_new_tokens
        is_hidden = token_id in self._hidden_ends
        text = row.text.rest() if is_hidden else row.text.add(token_id, final=final)
        if row.count > self._sampling.min_new_tokens:
            text = row.stops.add(text, final=final)
        ends = ends or row.stops.met is not None
        row.finished = final or ends
        if row.finished and self._speculator is not None:
            self._speculator.ended()
        finish: Finish | None = ("stop" if ends else "length") if row.finished else None
        return Picked(row.number, token_id, position, text, choice.logprobs, finish, row.stops.met, prompt)
