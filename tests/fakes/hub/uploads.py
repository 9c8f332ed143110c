"""What the fake hub does with uploads: the endpoints that huggingface_hub 2.4 uses to make a repository and a commit.

Speaks what was read in huggingface_hub's source: `/api/repos/create`, the check of a card, `preupload`, the LFS batch,
PUT of a content to storage, and a commit as lines of JSON. Uploads need a token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fakes.hub.server import HubServer


class Uploads:
    """Mixin of the hub's request handler."""

    hub: HubServer
    is_cdn: bool
    path: str
    headers: Any
    rfile: Any
    _send: Callable[..., None]
    _refuse: Callable[..., None]

    @property
    def token(self) -> str | None:
        """The token that the client sent."""
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((f"POST {path}", self.token))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.token not in self.hub.tokens:
            return self._refuse(401, message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            return self._preupload(match[1], json.loads(body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self._commit_files(match[1], match[2], [json.loads(line) for line in body.splitlines()])
        return self._refuse(404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        sha256 = self.path.rpartition("/")[2]
        assert self.is_cdn
        assert self.token is None, "storage must not see the token"
        if hashlib.sha256(body).hexdigest() != sha256:
            return self._refuse(400)
        self.hub.store(sha256, body)
        self._send(200, b"", {})

    def _json(self, fields: dict[str, Any], kind: str = "application/json", status: int = 200) -> None:
        self._send(status, json.dumps(fields).encode(), {"Content-Type": kind})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            # huggingface_hub takes the address of what is there from the refusal.
            return self._json(
                {"url": f"{self.hub.url}/{name}", "error": "You already created this model repo"}, status=409
            )
        self.hub.repos[name].private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _preupload(self, name: str, asked: dict[str, Any]) -> None:
        suffixes = self.hub.repos[name].lfs_suffixes
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(suffixes) else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._json({"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for wanted in asked["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.has(wanted["oid"]):
                entry["actions"] = {"upload": {"href": f"{self.hub.cdn_url}/uploads/{wanted['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def _commit_files(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        repo = self.hub.repos[name]
        files = dict(repo.commits.get(repo.refs.get(branch, ""), {}))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blob(value["oid"])[1]
        commit = self.hub.commit(name, files, branch)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})
