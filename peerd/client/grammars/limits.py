"""The bounds on the work and memory of a grammar: on what it describes, not on how long it is."""

from __future__ import annotations

from llguidance import LLParserLimits


def parser_limits() -> LLParserLimits:
    """The bounds. The library's defaults let a grammar of a few bytes compute for seconds, and take hundreds of
    megabytes; with these a token takes less than a tenth of a second.
    """
    return LLParserLimits(
        initial_lexer_fuel=250_000, step_max_items=20_000, max_lexer_states=20_000, verbose_errors=False
    )
