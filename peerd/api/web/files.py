"""Serves the files of the page, and forbids the browser to load anything from elsewhere.

The files are part of the package; there is no build step. They hold no secret, so they are served without the token:
the page asks the user for it, or finds it in the fragment of the link that the daemon printed.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from peerd.api.errors import ApiError

# The folder of the files, and the beginning of their paths on the server.
PREFIX = "/web/"
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    # The page may load its own files and ask this daemon. Inline code and styles do not run, so a model's answer that
    # reaches the page as HTML by mistake cannot act.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Another version of the daemon has other files under the same names.
    "cache-control": "no-cache",
}


def page_routes() -> list[BaseRoute]:
    """The page itself, and the files that it loads."""
    return [Route("/", _page), Route("/favicon.ico", _icon), Route(PREFIX + "{name}", _file)]


def is_page_path(path: str) -> bool:
    """Whether `path` is a file of the page; these are served without a token."""
    return path in ("/", "/favicon.ico") or path.startswith(PREFIX)


async def _page(request: Request) -> Response:
    return _response("index.html")


async def _icon(request: Request) -> Response:
    return _response("icon.svg")


async def _file(request: Request) -> Response:
    return _response(request.path_params["name"])


def _response(name: str) -> Response:
    content = _files().get(name)
    if content is None:
        raise ApiError(404, f"there is no {PREFIX}{name[:100]} here", code="unknown_url")
    return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=_HEADERS)


@cache
def _files() -> dict[str, bytes]:
    """All files by name. A name from a request is looked up here and never used as a path."""
    folder = resources.files("peerd.api.web") / "static"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in _TYPES}
