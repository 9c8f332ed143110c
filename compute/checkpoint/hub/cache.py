"""One repository in huggingface_hub's cache on this disk, whose layout many programs share.

`blobs/` holds contents by their hash, `snapshots/COMMIT/` links file names to them, and `refs/` says to which commit a
branch was last resolved. The hub's list of a commit's files is kept too, in peerd's own folder, so that a server can
start again while the hub is unreachable.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import constants

from peerd.compute.checkpoint.hub.http import Fetchable, HubFile, Listing
from peerd.compute.checkpoint.hub.id import is_commit
from peerd.compute.checkpoint.hub.settings import HubSettings

# This is not huggingface_hub's own suffix, because other versions of it would append to our file, or delete it.
PARTIAL_SUFFIX = ".peerd-incomplete"


class HubCache:
    """The files of one repository on this disk."""

    def __init__(self, settings: HubSettings, repo: str) -> None:
        name = f"models--{repo.replace('/', constants.REPO_ID_SEPARATOR)}"
        self.repo = repo
        self.folder = settings.folder / name
        self._listings = settings.own_folder / "listings" / name

    def snapshot(self, commit: str) -> Path:
        """The folder with the commit's files by name."""
        return self.folder / "snapshots" / commit

    def blob(self, file: Fetchable) -> Path:
        """The path of the file's content, whether it is here yet or not."""
        return self.folder / "blobs" / file.blob

    def partial(self, file: Fetchable) -> Path:
        """The path of the file's content while it is incomplete."""
        return self.folder / "blobs" / f"{file.blob}{PARTIAL_SUFFIX}"

    def link(self, commit: str, file: Fetchable) -> None:
        """Give the file's content its name in the commit's snapshot."""
        pointer, blob = self.snapshot(commit) / file.name, self.blob(file)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            pointer.unlink()
        try:
            if constants.HF_HUB_DISABLE_SYMLINKS:
                raise OSError("symbolic links are switched off")
            os.symlink(os.path.relpath(blob, pointer.parent), pointer)
        except FileExistsError:
            pass  # another process was faster
        except OSError:
            os.link(blob, pointer)

    def known_commit(self, revision: str | None) -> str | None:
        """The commit to which the revision was resolved the last time, by peerd or another program, or None."""
        revision = revision or constants.DEFAULT_REVISION
        if is_commit(revision):
            return revision
        try:
            commit = (self.folder / "refs" / revision).read_text().strip()
        except OSError:
            return None
        return commit if is_commit(commit) else None

    def remember(self, revision: str | None, listing: Listing) -> None:
        """Save the hub's answer. If that fails, a later start without the hub fails too."""
        revision = revision or constants.DEFAULT_REVISION
        with suppress(OSError):
            fields = {"files": [asdict(file) for file in listing.files.values()]}
            _write(self._listings / f"{listing.commit}.json", json.dumps(fields))
        if not is_commit(revision):
            with suppress(OSError):
                _write(self.folder / "refs" / revision, listing.commit)

    def known_listing(self, commit: str) -> Listing | None:
        """The hub's saved list of the commit's files, or the files that other programs left here; None if there is
        neither.
        """
        try:
            entries = json.loads((self._listings / f"{commit}.json").read_bytes())["files"]
            files = [HubFile(**entry) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError):
            files = list(self._files_here(commit))
        return Listing(self.repo, commit, {file.name: file for file in files}) if files else None

    def _files_here(self, commit: str) -> Iterator[HubFile]:
        with suppress(OSError):
            for path in sorted(self.snapshot(commit).iterdir()):
                if path.is_file():
                    blob = path.resolve().name
                    is_lfs = re.fullmatch(r"[0-9a-f]{64}", blob) is not None
                    yield HubFile(path.name, path.stat().st_size, blob if is_lfs else None, "" if is_lfs else blob)


def forget(blob: Path) -> None:
    """Delete a content and every name that a snapshot gives it. Raises OSError."""
    for pointer in (blob.parent.parent / "snapshots").glob("*/*"):
        with suppress(FileNotFoundError):
            if pointer.exists() and pointer.samefile(blob):
                pointer.unlink()
    blob.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    """Write the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
