"""`peerd models --families`: which architectures are served, which are refused, and why."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable

from peerd.cli.console import write
from peerd.compute.checkpoint.gguf.architectures import ARCHITECTURES
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.families.refused import NOT_SERVED, REFUSED

_WIDTH = 100


def print_families(*, as_json: bool) -> None:
    """Print them by the names that `config.json` gives as `model_type`."""
    write(f"{_as_json() if as_json else _as_text()}\n")


def _as_json() -> str:
    fields = {"served": sorted(FAMILIES), "gguf": sorted(ARCHITECTURES), "refused": {**REFUSED, **NOT_SERVED}}
    return json.dumps(fields)


def _as_text() -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in {**REFUSED, **NOT_SERVED}.items():
        by_reason.setdefault(reason, []).append(name)
    parts = [
        f"{len(FAMILIES)} architectures are served, by the model_type in config.json:",
        _names(FAMILIES),
        f"{len(ARCHITECTURES)} of them from GGUF files too, by the architecture that the file names:",
        _names(ARCHITECTURES),
        f"{sum(map(len, by_reason.values()))} are refused:",
    ]
    for reason, names in by_reason.items():
        parts.append(textwrap.fill(reason, _WIDTH, initial_indent="  ", subsequent_indent="  "))
        parts.append(_names(names, "    "))
    return "\n".join(parts)


def _names(names: Iterable[str], indent: str = "  ") -> str:
    text = ", ".join(sorted(names))
    return textwrap.fill(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
