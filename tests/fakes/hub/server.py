"""A model hub on loopback: the endpoints that huggingface_hub 2.4 uses to read models, and faults on demand. What is
uploaded to it can be read again.

It implements what huggingface_hub's source uses: `/api/models/REPO/revision/REV?blobs=true`, `/REPO/resolve/REV/FILE`
with its metadata headers, redirects of LFS files to another origin that must not see the token, byte ranges, and the
`X-Error-Code` of refusals. It counts the bytes that it sends, file by file.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.fakes.hub.uploads import Uploads

# Small enough that a test can stop in the middle of a tiny model's shard.
SEND_BYTES = 4096


@dataclass
class Fault:
    """The fault of one request for a file: it replaces the answer, or ends it in the middle."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    corrupt: bool = False
    ignore_range: bool = False
    #: After `cut_after` bytes wait for this, then go on.
    wait_for: threading.Event | None = None


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    lfs_suffixes: tuple[str, ...] = (".safetensors", ".bin", ".gguf")


class HubServer:
    """The hub's files, and the requests that it got."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = defaultdict(Repo)
        self.tokens = {"hf_good"}
        self.admitted = {"hf_good"}
        #: Bytes of content that were sent, by file name.
        self.served: Counter[str] = Counter()
        #: The file and the first byte of every answer with content. (Bytes may be sent to a client that has just gone.)
        self.answers: list[tuple[str, int]] = []
        #: `METHOD /path` of every request, and the token that came with it.
        self.requests: list[tuple[str, str | None]] = []
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        #: Every request is answered with this status while it is set.
        self.down: int | None = None
        self.asked = threading.Condition()
        self._blobs: dict[str, tuple[str, bytes]] = {}
        self.url = self.cdn_url = ""

    def push(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Make the folder's files the branch's newest commit; returns the commit."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        return self.commit(repo, files, branch)

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make these files the branch's newest commit; returns the commit."""
        digest = hashlib.sha1(repo.encode())
        for name, data in files.items():
            digest.update(name.encode() + hashlib.sha256(data).digest())
            self._blobs[hashlib.sha256(data).hexdigest()] = (name, data)
        commit = digest.hexdigest()
        self.repos[repo].commits[commit] = files
        self.repos[repo].refs[branch] = commit
        return commit

    def store(self, sha256: str, data: bytes) -> None:
        """Keep a content that no commit names yet."""
        self._blobs[sha256] = (sha256, data)

    def has(self, sha256: str) -> bool:
        return sha256 in self._blobs

    def fail(self, name: str, *faults: Fault) -> None:
        """Give the next requests for the file's content these faults, one each. `api` stands for the listing."""
        self.faults[name].extend(faults)

    def next_fault(self, name: str) -> Fault:
        return self.faults[name].popleft() if self.faults[name] else Fault()

    def blob(self, sha256: str) -> tuple[str, bytes]:
        return self._blobs[sha256]

    def count(self, name: str, n_bytes: int) -> None:
        with self.asked:
            self.served[name] += n_bytes
            self.asked.notify_all()

    def wait_until_served(self, name: str, n_bytes: int, timeout_s: float = 20) -> None:
        with self.asked:
            assert self.asked.wait_for(lambda: self.served[name] >= n_bytes, timeout_s), f"{name} was not fetched"


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(Uploads, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    is_cdn: bool

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((f"{self.command} {path}", self.token))
        if self.hub.down is not None:
            self._refuse(self.hub.down)
        elif self.is_cdn:
            name, data = self.hub.blob(path.rpartition("/")[2])
            self._content(name, data, {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._listing(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._refuse(404)

    def _commit(self, name: str, revision: str) -> str | None:
        """The commit, or None after a refusal."""
        repo = self.hub.repos.get(name)
        if self.token is not None and self.token not in self.hub.tokens:
            self._refuse(401, message="Invalid credentials in Authorization header")
            return None
        if repo is None or (repo.private and self.token is None):
            # As the real hub: without a token a client does not learn whether such a model exists.
            self._refuse(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
            return None
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self._refuse(404, "RevisionNotFound", "Invalid rev id: " + revision)
            return None
        return commit

    def _listing(self, name: str, revision: str) -> None:
        fault = self.hub.next_fault("api")
        if fault.status is not None:
            return self._refuse(fault.status, headers=fault.headers)
        commit = self._commit(name, revision)
        if commit is None:
            return
        repo = self.hub.repos[name]
        siblings = []
        for file, data in repo.commits[commit].items():
            entry: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": git_hash(data)}
            if file.endswith(repo.lfs_suffixes):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        body = json.dumps({"id": name, "sha": commit, "private": repo.private, "siblings": siblings}).encode()
        self._send(200, body, {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        commit = self._commit(name, revision)
        if commit is None:
            return
        repo = self.hub.repos[name]
        if repo.gated and self.token not in self.hub.admitted:
            return self._refuse(401 if self.token is None else 403, "GatedRepo", "Access to model is restricted")
        data = repo.commits[commit].get(file)
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(data)}"'}
        if not file.endswith(repo.lfs_suffixes):
            return self._content(file, data, headers)
        sha256 = hashlib.sha256(data).hexdigest()
        headers |= {
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.cdn_url}/blobs/{sha256}",
        }
        self._send(302, b"", headers)

    def _content(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        fault = self.hub.next_fault(name) if self.command == "GET" else Fault()
        if fault.status is not None:
            return self._refuse(fault.status, headers=fault.headers)
        start, end, status = 0, len(data), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and not fault.ignore_range:
            start, end = int(wanted[1]), min(int(wanted[2] or len(data)) + bool(wanted[2]), len(data))
            if start >= len(data):
                return self._refuse(416, headers={"Content-Range": f"bytes */{len(data)}"})
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        if self.command == "GET":
            self.hub.answers.append((name, start))
        if fault.corrupt:
            data = bytes(len(data))
        self._send(status, data[start:end], headers | {"Accept-Ranges": "bytes"}, name, fault)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], name: str | None = None, fault: Fault | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = fault or Fault()
        for at in range(0, len(body), SEND_BYTES):
            if fault.cut_after is not None and at >= fault.cut_after:
                if fault.wait_for is None:
                    self.close_connection = True
                    return
                fault.wait_for.wait(30)
            piece = body[at : at + SEND_BYTES]
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True
                return
            if name is not None:
                self.hub.count(name, len(piece))

    def _refuse(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None) -> None:
        found = dict(headers or {})
        if code:
            found["X-Error-Code"] = code
        if message:
            found["X-Error-Message"] = message
        self._send(status, b"", found)


@contextmanager
def open_hub() -> Iterator[HubServer]:
    """A hub and its storage on two ports, until the block ends."""
    hub = HubServer()
    with _serving(hub, is_cdn=False) as hub.url, _serving(hub, is_cdn=True) as hub.cdn_url:
        yield hub


@contextmanager
def _serving(hub: HubServer, *, is_cdn: bool) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"hub": hub, "is_cdn": is_cdn})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
