"""Speaks the hub's HTTP: which files a revision has, and the bytes of a file from any position on.

It uses huggingface_hub's session, headers, token and error types, but not its downloads: they keep no partial file
across runs and cannot be stopped between blocks of 10 MB. Each failure must be attributed. What may pass by itself is
`Transient`, and the caller tries again; everything else is a CheckpointError that names the fix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeAlias

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from peerd.compute.checkpoint.hub.id import HubId, is_commit
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_HASH = re.compile(r"[0-9a-f]{40}")
# Only files at the root of the repository are read, and GGUF files one folder below, where publishers put those that
# have several parts; beside them are other formats and examples. The pattern is strict because these names become file
# names on this disk.
_NAME = re.compile(r"\w[\w.+ -]{0,199}|\w[\w.+ -]{0,199}/\w[\w.+ -]{0,199}\.gguf", re.ASCII)
# Statuses that may pass by themselves: timeouts and too many requests. Every 5xx status may, too.
_TRANSIENT_STATUS = (408, 425, 429)
# We never wait longer than this, even if the hub asks for more.
_MAX_RETRY_AFTER_S = 60.0


class Transient(Exception):
    """A failure that may pass. `after_s`: how long the hub asked us to wait."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub lists it. LFS files have a `sha256`; for the others `git_hash` is the hash of the content."""

    name: str
    size: int
    sha256: str | None
    git_hash: str

    @property
    def blob(self) -> str:
        """The name of the file's content in the cache, which is also the hub's entity tag."""
        return self.sha256 or self.git_hash

    @property
    def whole(self) -> HubFile:
        """The file that the hub lists: this one."""
        return self

    @property
    def start(self) -> int:
        """The position in that file at which this one begins."""
        return 0


@dataclass(frozen=True, slots=True)
class HubPiece:
    """The bytes of a file from `start` up to `end`, fetched and kept as a file of its own. The hub lists no hash."""

    whole: HubFile
    start: int
    end: int

    @property
    def name(self) -> str:
        """The piece's name on this disk."""
        return f"{self.whole.name.replace('/', '--')}.{self.start}-{self.end}"

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self.end - self.start

    @property
    def blob(self) -> str:
        """The name of its content in the cache."""
        return f"{self.whole.blob}.{self.start}-{self.end}"


#: What is fetched and kept as one file.
Fetchable: TypeAlias = HubFile | HubPiece


@dataclass(frozen=True, slots=True)
class Listing:
    """The files at the root of one commit, by name."""

    repo: str
    commit: str
    files: Mapping[str, HubFile]


class Hub:
    """One hub, as one user (with that user's token) sees it."""

    def __init__(self, settings: HubSettings) -> None:
        self._endpoint = settings.endpoint
        self._token = settings.token

    @property
    def endpoint(self) -> str:
        """The URL of the hub."""
        return self._endpoint or constants.ENDPOINT

    def listing(self, hub_id: HubId) -> Listing:
        """The files that the revision has now. Raises Transient or CheckpointError."""
        api = HfApi(endpoint=self._endpoint, token=self._token, library_name="peerd", library_version=version("peerd"))
        revision = hub_id.revision or constants.DEFAULT_REVISION
        with self._errors(hub_id):
            try:
                info = api.model_info(
                    hub_id.repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
                )
                if not is_commit(info.sha or ""):
                    raise ValueError(f"the commit is {info.sha!r}")
                files = [_file(sibling) for sibling in info.siblings or () if _NAME.fullmatch(sibling.rfilename)]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{self.endpoint} does not answer as a model hub about {hub_id} ({error}): check HF_ENDPOINT"
                ) from error
        return Listing(hub_id.repo, str(info.sha), {file.name: file for file in files})

    @contextmanager
    def stream(self, listing: Listing, file: Fetchable, start: int, end: int | None = None) -> Iterator[Stream]:
        """The file's bytes from `start` up to `end`. Raises Transient or CheckpointError, also while the bytes are
        read.
        """
        if isinstance(file, HubPiece):
            end = file.size if end is None else end
        first, last = file.start + start, None if end is None else file.start + end
        url = hf_hub_url(listing.repo, file.whole.name, revision=listing.commit, endpoint=self._endpoint)
        headers = build_hf_headers(token=self._token, library_name="peerd", library_version=version("peerd"))
        # If the answer were compressed, sizes and positions would not be the file's.
        headers["Accept-Encoding"] = "identity"
        if first or last is not None:
            headers["Range"] = f"bytes={first}-{'' if last is None else last - 1}"
        with (
            self._errors(HubId(listing.repo, listing.commit), file.name),
            get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
        ):
            hf_raise_for_status(response)
            # A hub that ignores the range sends the file from its start.
            position = _first_position(response, first) - file.start
            if position < 0:
                raise Transient("the hub ignored the range that was requested, and a whole file is too large to skip")
            yield Stream(position, response.iter_raw())

    def read_range(self, listing: Listing, file: Fetchable, start: int, end: int) -> bytes:
        """The bytes of a file from `start` up to `end`. Raises Transient or CheckpointError."""
        data = bytearray()
        with self.stream(listing, file, start, end) as stream:
            position = stream.start
            for chunk in stream.chunks:
                data += chunk[max(0, start - position) :]
                position += len(chunk)
                if len(data) >= end - start:
                    return bytes(data[: end - start])
        raise Transient(f"{file.name} ended after {position} bytes")

    @contextmanager
    def _errors(self, hub_id: HubId, name: str = "") -> Iterator[None]:
        """Turn every failure of a request into Transient or into a CheckpointError that says what the user must do."""
        what = f"{hub_id}: {name}" if name else str(hub_id)
        try:
            yield
        except GatedRepoError as error:
            fix = "set HF_TOKEN or run `hf auth login`" if error.response.status_code == 401 else "wait to be admitted"
            raise CheckpointError(
                f"{what}: the model is gated: accept its terms at {self.endpoint}/{hub_id.repo}, then {fix}"
            ) from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{self.endpoint} has no model {hub_id.repo}, or it is private or gated: check the spelling; if you may"
                " read it, set HF_TOKEN or run `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(
                f"{hub_id.repo} has no revision {hub_id.revision!r} at {self.endpoint}: give a branch, a tag or"
                " a commit"
            ) from error
        except RemoteEntryNotFoundError as error:
            raise CheckpointError(f"{what}: is not there any more") from error
        except DisabledRepoError as error:
            raise CheckpointError(f"{what}: the hub has disabled this model") from error
        except OfflineModeIsEnabled as error:
            raise Transient("offline mode is on (HF_HUB_OFFLINE)") from error
        except HfHubHTTPError as error:
            raise self._status_error(what, error.response) from error
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.LocalProtocolError) as error:
            raise CheckpointError(f"{what}: {self.endpoint} cannot be asked ({error}): check HF_ENDPOINT") from error
        except httpx2.TransportError as error:
            raise Transient(str(error) or type(error).__name__) from error
        except (httpx2.TooManyRedirects, httpx2.DecodingError) as error:
            raise CheckpointError(f"{what}: {self.endpoint} does not answer as a model hub: {error}") from error

    def _status_error(self, what: str, response: httpx2.Response) -> Exception:
        status = response.status_code
        if status in _TRANSIENT_STATUS or status >= 500:
            return Transient(f"the hub answered {status} {response.reason_phrase}", _retry_after_s(response))
        if status == 401:
            return CheckpointError(f"{what}: the hub refuses the token: check HF_TOKEN, or run `hf auth login`")
        if status == 403:
            return CheckpointError(f"{what}: the token may not read it (403): use one that may, as HF_TOKEN")
        return CheckpointError(f"{what}: {self.endpoint} answered {status} {response.reason_phrase}")


@dataclass(frozen=True, slots=True)
class Stream:
    """Bytes of a file as they arrive; `start` is the position of the first."""

    start: int
    chunks: Iterator[bytes]


def _file(sibling: RepoSibling) -> HubFile:
    lfs = sibling.lfs
    size = lfs.size if lfs else sibling.size
    sha256 = lfs.sha256 if lfs else None
    git_hash = sibling.blob_id or ""
    if type(size) is not int or size < 0:
        raise ValueError(f"{sibling.rfilename} has no size")
    if not (_SHA256.fullmatch(sha256) if sha256 is not None else _GIT_HASH.fullmatch(git_hash)):
        raise ValueError(f"{sibling.rfilename} has no hash")
    return HubFile(sibling.rfilename, size, sha256, git_hash)


def _first_position(response: httpx2.Response, asked: int) -> int:
    """The position in the file at which the answer begins. Raises Transient if the answer does not say so."""
    if response.status_code != 206:
        return 0
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) > asked:
        raise Transient("the hub answered with another range than requested")
    return int(match[1])


def _retry_after_s(response: httpx2.Response) -> float:
    value = response.headers.get("Retry-After", "")
    return min(float(value), _MAX_RETRY_AFTER_S) if value.isascii() and value.isdecimal() else 0.0
