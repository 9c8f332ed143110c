"""The link to the daemon's page, with the token in it, for the user who started the daemon with --open."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Callable, Mapping
from contextlib import suppress
from urllib.parse import quote

import trio


def page_link(url: str, token: str | None) -> str:
    """The page's address on this machine. The token is in the fragment, which a browser does not send.

    `url`: the address on which the API listens. It may stand for all addresses of this machine, of which a browser
    needs one.
    """
    for every, one in (("//0.0.0.0:", "//127.0.0.1:"), ("//[::]:", "//[::1]:")):
        url = url.replace(every, one)
    return f"{url}/" if token is None else f"{url}/#token={quote(token, safe='')}"


async def show_page(
    link: str,
    *,
    environ: Mapping[str, str] = os.environ,
    open_browser: Callable[[str], object] = webbrowser.open,
) -> None:
    """Print the link, and open it in a browser if there is a desktop. If that fails, the daemon runs on.

    The link goes to standard error and not into the log, because it gives access to the daemon and others may read the
    log.
    """
    with suppress(OSError, ValueError):
        print(f"open {link}", file=sys.stderr, flush=True)
    if environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"):
        with suppress(webbrowser.Error, OSError):
            await trio.to_thread.run_sync(open_browser, link, abandon_on_cancel=True)
