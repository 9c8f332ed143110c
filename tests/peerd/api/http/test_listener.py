"""How many connections the local API accepts, and what it does when there are more."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from peerd.api.http import listener as listener_module
from peerd.api.http.listener import HttpListener
from peerd.net.containment import Containment

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


class Silent:
    """Answers nothing. `asked`: how many requests have come."""

    def __init__(self):
        self.asked = 0

    async def __call__(self, scope, receive, send):
        self.asked += 1
        while (await receive())["type"] != "http.disconnect":
            pass


@asynccontextmanager
async def open_listener(app, most):
    """`async with open_listener(app, most) as port:` a listener on loopback."""
    [accepting] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with accepting, trio.open_nursery() as nursery:
        nursery.start_soon(HttpListener(app, Containment(), most).serve, accepting)
        yield accepting.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def get(port):
    return httpx.get(f"http://127.0.0.1:{port}/", timeout=60)


def sockets_open():
    """How many sockets this process has open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except FileNotFoundError:
            continue
    return found


@pytest.mark.real_time
async def test_connections_that_clients_close_leave_no_descriptor():
    async with open_listener(hello, 400) as port:
        before = sockets_open()
        for _ in range(40):
            async with await trio.open_tcp_stream("127.0.0.1", port):
                pass
        while sockets_open() > before:
            await trio.sleep(0.01)


@pytest.mark.real_time
async def test_idle_connections_make_room_for_a_new_one():
    async with open_listener(hello, 4) as port, trio.open_nursery() as nursery:
        idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(4)]
        answer = await trio.to_thread.run_sync(get, port)
        assert answer.text == "hi"
        # The first that came has been idle for longest.
        assert await idle[0].receive_some() == b""
        for each in idle:
            nursery.start_soon(each.aclose)


@pytest.mark.real_time
async def test_connections_with_a_request_are_kept_and_newcomers_told():
    silent = Silent()
    async with open_listener(silent, 2) as port:
        busy = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2)]
        for each in busy:
            await each.send_all(GET)
        while silent.asked < 2:
            await trio.sleep(0.01)
        refused = await trio.to_thread.run_sync(get, port)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
        assert int(refused.headers["retry-after"]) > 0
        with trio.move_on_after(0.1) as scope:
            await busy[0].receive_some()
        assert scope.cancelled_caught
        for each in busy:
            await each.aclose()


class Exhausted:
    """A listener in a process that has no descriptors left, for a while."""

    def __init__(self, times):
        self.times = times

    async def accept(self):
        await trio.lowlevel.checkpoint()
        if not self.times:
            await trio.sleep_forever()
        self.times -= 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def aclose(self):
        pass


async def test_a_process_without_descriptors_waits_and_says_so_once(caplog):
    listener = Exhausted(200)
    with caplog.at_level(logging.WARNING), trio.move_on_after(30):
        await HttpListener(hello, Containment(), 4).serve(listener)
    assert listener.times == 0
    [said] = [record for record in caplog.records if record.name == listener_module.__name__]
    assert "Too many open files" in said.getMessage()
    assert said.exc_info is None
