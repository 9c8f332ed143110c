"""Writes the findings: as text for people, in as many columns as there are, or as one JSON object."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence

from peerd.cli.doctor.finding import Finding, Level, worst

_INDENT = "  "
# A narrower terminal than this breaks lines itself.
_LEAST_WIDTH = 20


def as_text(findings: Sequence[Finding], width: int | None) -> str:
    """A paragraph for each finding, and the sum. `width`: of the terminal; None to break no lines."""
    lines: list[str] = []
    for finding in findings:
        lines += _wrapped(f"{finding.level}: {finding.what}: {finding.said}", width, _INDENT)
        if finding.fix:
            lines += _wrapped(f"{_INDENT}fix: {finding.fix}", width, _INDENT * 2)
    counts = Counter(finding.level for finding in findings)
    problems = [_count(counts[level], str(level)) for level in (Level.ERROR, Level.WARNING) if counts[level]]
    return "\n".join([*lines, "", ", ".join(problems) if problems else "nothing is wrong"])


def as_json(findings: Sequence[Finding]) -> str:
    """The findings as one JSON object."""
    listed = [
        {"level": str(finding.level), "what": finding.what, "said": finding.said, "fix": finding.fix}
        for finding in findings
    ]
    return json.dumps({"worst": str(worst(findings)), "findings": listed}, indent=2, ensure_ascii=False)


def _wrapped(line: str, width: int | None, indent: str) -> list[str]:
    if width is None:
        return [" ".join([line])]
    # Addresses and paths stay whole, to be copied.
    return textwrap.wrap(
        line, max(width, _LEAST_WIDTH), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
