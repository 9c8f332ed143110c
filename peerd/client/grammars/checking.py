"""Finds grammars whose compilation would not end, in a process that can be killed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

import trio

from peerd.client.grammars.grammar import Grammar
from peerd.line_process import LineProcess

LIMIT_S = 2.0
# Programs send the same few with each request.
_MOST_REMEMBERED = 64


class GrammarCheck:
    """Checks one grammar at a time. Made by `open_grammar_check`."""

    def __init__(self, process: LineProcess) -> None:
        self._process = process
        self._turn = trio.Lock()
        # In the order in which they were checked.
        self._good: dict[Grammar, None] = {}

    def __repr__(self) -> str:
        return f"<GrammarCheck remembers={len(self._good)} {self._process}>"

    async def check(self, grammar: Grammar) -> None:
        """Raises InvalidRequest for a grammar that takes too long or too much memory; nothing else is found here."""
        if grammar in self._good:
            return
        asked = json.dumps(asdict(grammar)).encode() + b"\n"
        async with self._turn:
            await self._process.ask(asked)
        self._good[grammar] = None
        if len(self._good) > _MOST_REMEMBERED:
            del self._good[next(iter(self._good))]


@asynccontextmanager
async def open_grammar_check() -> AsyncIterator[GrammarCheck]:
    """A check whose process, started when it is needed, ends with the block."""
    process = LineProcess("peerd.client.grammars.check_process", "compiling it", LIMIT_S)
    try:
        yield GrammarCheck(process)
    finally:
        await process.close()
