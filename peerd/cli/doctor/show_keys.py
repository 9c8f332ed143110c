"""`peerd keys show`: whose key a file holds, without its secret."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from peerd.cli.console import write
from peerd.cli.doctor.facts import KeyFact
from peerd.cli.doctor.look_here import look_at_key
from peerd.protocol.errors import InvalidRequest


def show_keys(paths: Sequence[Path], *, as_json: bool) -> None:
    """Print whose keys these are. Raises InvalidRequest, after printing the others, if one cannot be used."""
    if not paths and not as_json:
        raise InvalidRequest("there is no key yet: the first daemon makes one, peerd --identity FILE another")
    facts = [look_at_key(path) for path in paths]
    good = [fact for fact in facts if not _problem(fact)]
    if as_json:
        listed = [
            {"path": str(fact.file.path), "peer_id": fact.peer_id, "in_use": fact.in_use, "problem": _problem(fact)}
            for fact in facts
        ]
        write(json.dumps({"keys": listed}, indent=2) + "\n")
    else:
        write("".join(f"{fact.peer_id}  {fact.file.path}{'  in use' if fact.in_use else ''}\n" for fact in good))
    if bad := [f"{fact.file.path} {_problem(fact)}" for fact in facts if _problem(fact)]:
        raise InvalidRequest("; ".join(bad))


def _problem(fact: KeyFact) -> str:
    return fact.file.problem if fact.file.exists else "does not exist"
