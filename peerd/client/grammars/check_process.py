"""The process in which grammars are compiled for the first time: reads one JSON line, writes one, until its input ends.

The library's bounds hold for most of what a grammar can cost, but not for all. What does not end here, or takes too
much memory, is killed, and is never compiled in the daemon. The vocabulary is the bytes, so it starts at once.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from peerd.client.grammars.grammar import Grammar
from peerd.client.grammars.limits import parser_limits
from peerd.client.grammars.tokens import Tokens

_MEMORY_BYTES = 1024**3


def main() -> None:
    """Answer each request when its compilation has ended, well or not; what is wrong is found later."""
    tokens = Tokens([bytes([byte]) for byte in range(256)], [], lambda text: list(text.encode()), lambda text: [])
    tokenizer = LLTokenizer(tokens)  # type: ignore[arg-type]
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    _write({"ready": True})
    for line in sys.stdin:
        try:
            matcher = LLMatcher(
                tokenizer, Grammar(**json.loads(line)).definition(), log_level=0, limits=parser_limits()
            )
            matcher.compute_bitmask()
        except (ValueError, RecursionError):
            pass
        _write({"done": True})


def _write(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
