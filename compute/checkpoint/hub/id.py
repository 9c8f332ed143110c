"""Parses the name of a model on a hub: `org/name`, and after an @ a revision (a branch, a tag or a commit).

A GGUF file of a repository is named by its path, `org/name/file.gguf`, or by how it is quantized, `org/name:Q4_K_M`.

It imports nothing slow, because the command line calls it before anything else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from peerd.compute.errors import CheckpointError

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# The hub's own limit.
_MAX_REPO_CHARS = 96
# Branches, tags, commits and pull requests (`refs/pr/3`).
_REVISION = re.compile(r"[\w][\w./+-]{0,249}", re.ASCII)
# A GGUF file, or a way of quantizing that is part of the names of such files.
_GGUF = re.compile(r":(?P<kind>\w[\w.-]{0,63})|/(?P<file>(?:\w[\w.+ -]{0,199}/)?\w[\w.+ -]{0,199}\.gguf)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository on the hub and a revision; None stands for the hub's default, `main`.

    gguf: one of its GGUF files, by its path or by a part of its name, such as `Q4_K_M`; empty for the repository's
        safetensors.
    """

    repo: str
    revision: str | None = None
    gguf: str = ""

    def __str__(self) -> str:
        sign = "/" if self.gguf.endswith(".gguf") else ":" if self.gguf else ""
        model = f"{self.repo}{sign}{self.gguf}"
        return model if self.revision is None else f"{model}@{self.revision}"

    @property
    def name(self) -> str:
        """The model's name for people: the last part of the repository's."""
        return self.repo.rpartition("/")[2]


def parse_hub_id(text: str, revision: str | None = None) -> HubId | None:
    """The id that `text` spells, with `revision` if it is given separately; None if `text` is no hub id.

    Raises CheckpointError if the revision is malformed, or if `text` and `revision` name two different ones.
    """
    model, at, named = text.partition("@")
    repo, gguf = _split_gguf(model)
    well_formed = _REPO.fullmatch(repo) and len(repo) <= _MAX_REPO_CHARS
    if not well_formed or "--" in repo or ".." in repo or repo.endswith((".", "-", ".git", ".gguf", ".safetensors")):
        return None
    if at and revision is not None and named != revision:
        raise CheckpointError(f"{text} names one revision and {revision!r} is another: say one of them")
    wanted = named if at else revision
    if wanted is not None and (not _REVISION.fullmatch(wanted) or ".." in wanted or wanted.endswith("/")):
        raise CheckpointError(f"{wanted!r} is no revision of {repo}: give a branch, a tag or a commit")
    return HubId(repo, wanted, gguf)


def _split_gguf(model: str) -> tuple[str, str]:
    """The repository, and what is said about a GGUF file of it, or an empty text."""
    match = _REPO.match(model)
    rest = _GGUF.fullmatch(model, match.end()) if match else None
    return (model, "") if match is None or rest is None else (match[0], rest["kind"] or rest["file"])


def hub_id_of(model: str | Path, revision: str | None = None) -> HubId | None:
    """The hub id that is meant, or None if `model` is a path. A file or folder on this machine takes precedence.

    Raises CheckpointError if the revision is malformed, or was given for a file or folder on this machine.
    """
    path = Path(model).expanduser()
    found = None if isinstance(model, Path) or path.exists() else parse_hub_id(model, revision)
    if found is None and revision is not None:
        raise CheckpointError(f"{model}: only a model on a hub has revisions, such as org/name; leave out {revision!r}")
    return found


def is_commit(revision: str) -> bool:
    """Whether `revision` is a full commit hash, which never refers to anything else later."""
    return _COMMIT.fullmatch(revision) is not None
