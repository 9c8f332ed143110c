"""The link to the daemon's page, with the token in it, for the person who started the daemon with --open."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Callable, Mapping
from contextlib import suppress
from urllib.parse import quote

import trio


def page_link(url: str, token: str | None) -> str:
    """The page's address on this machine. The token goes into the fragment, which a browser sends to nobody.

    `url`: where the API listens, which may be all of this machine's addresses; a browser needs one of them.
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
    """Print the link, and open it where there is a desktop. Failing to do so costs nothing but the convenience.

    The link goes to standard error, and not into the log, which others may read: who has it may use the daemon.
    """
    with suppress(OSError, ValueError):
        print(f"open {link}", file=sys.stderr, flush=True)
    if environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"):
        with suppress(webbrowser.Error, OSError):
            await trio.to_thread.run_sync(open_browser, link, abandon_on_cancel=True)
