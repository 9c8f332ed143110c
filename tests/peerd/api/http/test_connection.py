"""When a connection of the local API ends: simulated time, and streams in memory."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.utils import wrap_app
from trio.testing import lockstep_stream_pair, memory_stream_pair

from peerd.api.http.connection import IDLE_S, LINGER_S, WRITE_S, Connection

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Application:
    """Answers with `size` bytes when `may_answer` is set, and notes how its request ended."""

    def __init__(self, size=2):
        self.may_answer = trio.Event()
        self.ended = None
        self._answers = False
        self._size = size

    async def __call__(self, scope, receive, send):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, receive, nursery.cancel_scope)
            await self.may_answer.wait()
            self._answers = True
            length = [(b"content-length", str(self._size).encode())]
            await send({"type": "http.response.start", "status": 404, "headers": length})
            await send({"type": "http.response.body", "body": b"x" * self._size, "more_body": False})
            self.ended = "answered"
            nursery.cancel_scope.cancel()

    async def _listen(self, receive, scope):
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._answers:
            self.ended = "disconnected"
            scope.cancel()


@asynccontextmanager
async def open_connection(application, streams=memory_stream_pair):
    """`async with open_connection(app) as (client, ended)`: `ended` is set when our side has let go of it."""
    ours, client = streams()
    ended = trio.Event()

    async def run():
        config = Config()
        await Connection(wrap_app(application, 1, "asgi"), config, WorkerContext(None), ours).run()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield client, ended
        nursery.cancel_scope.cancel()


async def read_until(client, end):
    answer = b""
    while end not in answer:
        answer += await client.receive_some()
    return answer


@pytest.mark.parametrize("asks", [False, True], ids=["bare", "after a request"])
async def test_a_connection_ends_when_its_client_closes_it(asks):
    application = Application()
    application.may_answer.set()
    async with open_connection(application) as (client, ended):
        if asks:
            await client.send_all(GET)
            assert b"404 Not Found" in await read_until(client, b"xx")
        await client.aclose()
        with trio.fail_after(0.1):
            await ended.wait()


async def test_a_request_ends_when_its_client_hangs_up():
    application = Application()
    async with open_connection(application) as (client, ended):
        await client.send_all(GET)
        await client.aclose()
        with trio.fail_after(0.1):
            await ended.wait()
    assert application.ended == "disconnected"


async def test_a_connection_without_a_request_ends_after_a_while():
    async with open_connection(Application()) as (_, ended):
        began = trio.current_time()
        await ended.wait()
        assert trio.current_time() - began == pytest.approx(IDLE_S)


async def test_a_request_that_takes_long_is_not_idle():
    application = Application()
    async with open_connection(application) as (client, ended):
        await client.send_all(GET)
        await trio.sleep(2 * IDLE_S)
        assert not ended.is_set()
        application.may_answer.set()
        assert await read_until(client, b"xx")
        began = trio.current_time()
        await ended.wait()
        assert trio.current_time() - began == pytest.approx(IDLE_S)


async def test_a_client_that_reads_nothing_is_cut_off():
    application = Application(size=1_000_000)
    application.may_answer.set()
    # Here a write waits until the client reads.
    async with open_connection(application, lockstep_stream_pair) as (client, ended):
        await client.send_all(GET)
        began = trio.current_time()
        await ended.wait()
        assert WRITE_S <= trio.current_time() - began < WRITE_S + 1


async def test_what_a_client_still_sends_after_the_last_answer_is_read_for_a_moment():
    application = Application()
    application.may_answer.set()
    async with open_connection(application) as (client, ended):
        await client.send_all(GET.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 9000\r\n\r\n"))
        assert (await read_until(client, b"xx")).endswith(b"xx")
        began = trio.current_time()
        for _ in range(5):
            await client.send_all(b"y" * 1000)
        assert await client.receive_some() == b""
        await ended.wait()
        assert trio.current_time() - began == pytest.approx(LINGER_S)


async def test_http_2_is_not_spoken():
    application = Application()
    application.may_answer.set()
    async with open_connection(application) as (client, ended):
        await client.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        with trio.fail_after(LINGER_S + 1):
            await ended.wait()
