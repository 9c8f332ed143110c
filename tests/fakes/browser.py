"""A real Chromium without a window, driven over its debugging protocol (the Chrome DevTools Protocol)."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio
from trio_websocket import WebSocketConnection, open_websocket_url

#: None where no Chromium is installed; tests that need one are then skipped.
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_START_S = 60.0
# Only a failure waits this long, also on a machine that is busy with other tests.
_WAIT_S = 60.0


class Page:
    """One tab, or the browser itself. `errors`: everything that the page reports as an error in its console."""

    def __init__(self, socket: WebSocketConnection) -> None:
        self.errors: list[str] = []
        self._socket = socket
        self._answers: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}
        self._number = 0

    async def receive(self) -> None:
        """Receive the browser's messages until cancelled."""
        while True:
            message = json.loads(await self._socket.get_message())
            if "id" in message:
                self._answers.pop(message["id"]).send_nowait(message)
            elif message["method"] == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
            elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(message["params"]["entry"]["text"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send the browser a command. Raises RuntimeError if it refuses."""
        self._number += 1
        send, receive = trio.open_memory_channel[dict[str, Any]](1)
        self._answers[self._number] = send
        await self._socket.send_message(json.dumps({"id": self._number, "method": method, "params": params}))
        answer = await receive.receive()
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def go(self, url: str) -> None:
        """Load a page, and wait until it has loaded."""
        await self.call("Page.navigate", url=url)
        await self.wait("document.readyState === 'complete'")

    async def run(self, script: str) -> Any:
        """Return the value of a script; a promise is awaited. Raises AssertionError for an exception in it."""
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def wait(self, condition: str) -> None:
        """Wait until a script's value is true. Raises AssertionError after `_WAIT_S`, with what the page shows."""
        with trio.move_on_after(_WAIT_S):
            while not await self.run(f"Boolean({condition})"):
                await trio.sleep(0.05)
            return
        shown = await self.run("document.body.innerText")
        raise AssertionError(f"never: {condition}; the page: {shown}; {self.errors}")

    async def type(self, text: str) -> None:
        """Type a text into the focused element."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        """Press a key by its name: Enter, Escape, Tab."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        text = {"Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra)

    async def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window, and the system's preference for light or dark."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self, path: Path) -> None:
        """Return the window's content as PNG."""
        shot = await self.call("Page.captureScreenshot", format="png")
        await trio.Path(path).write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def run_chromium(profile: Path) -> Iterator[str]:
    """Run a browser with an empty profile in `profile`; yields the address over which it is controlled."""
    assert CHROMIUM is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    command = [CHROMIUM, *options, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            # The browser writes its port into this file when it listens.
            ready = profile / "DevToolsActivePort"
            until = time.monotonic() + _START_S
            while not ready.is_file() or len(ready.read_text().splitlines()) < 2:
                assert time.monotonic() < until, "the browser did not start"
                time.sleep(0.05)
            port, path = ready.read_text().splitlines()[:2]
            yield f"ws://127.0.0.1:{port}{path}"
        finally:
            process.kill()


@asynccontextmanager
async def open_page(browser_url: str) -> AsyncIterator[Page]:
    """A new tab, which shares neither storage nor cookies with others."""
    async with open_websocket_url(browser_url) as socket, trio.open_nursery() as nursery:
        browser = Page(socket)
        nursery.start_soon(browser.receive)
        context = await browser.call("Target.createBrowserContext", disposeOnDetach=True)
        tab = await browser.call("Target.createTarget", url="about:blank", **context)
        address = urlsplit(browser_url)
        tab_url = f"ws://{address.netloc}/devtools/page/{tab['targetId']}"
        async with open_websocket_url(tab_url, max_message_size=2**26) as tab_socket:
            page = Page(tab_socket)
            nursery.start_soon(page.receive)
            for domain in ("Page", "Runtime", "Log"):
                await page.call(f"{domain}.enable")
            try:
                yield page
            finally:
                # Stop `receive` before the websockets close, which would make it raise.
                nursery.cancel_scope.cancel()
