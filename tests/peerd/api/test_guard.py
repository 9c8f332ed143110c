"""Which requests may use the local API."""

from __future__ import annotations

import pytest
from starlette.responses import PlainTextResponse

from peerd.api.guard import Guard

TOKEN = "t" * 40


async def status_of(guard, path="/v1/models", method="GET", **headers):
    """The status a request gets, 200 where it is let through."""
    said = []

    async def send(message):
        said.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b""}
    await guard(scope, receive, send)
    return said[0]["status"]


def guard(token=None, names=()):
    return Guard(PlainTextResponse("in"), token=token, names=names)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "LOCALHOST", "peerd", "127.0.0.1:1", "[::1]:8080", "192.168.1.5:8080"]
)
async def test_our_own_names_and_plain_addresses_are_let_in(host):
    assert await status_of(guard(), host=host) == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example:80", "[::1"])
async def test_a_page_that_was_rebound_to_us_still_says_its_own_name_and_is_refused(host):
    assert await status_of(guard(), host=host) == 421


async def test_a_request_without_host_is_refused():
    assert await status_of(guard()) == 421


async def test_the_name_that_the_operator_bound_is_ours():
    assert await status_of(guard(names=["Box.lan"]), host="box.lan:8080") == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:9999", "https://localhost"])
async def test_pages_of_another_origin_are_refused(origin):
    assert await status_of(guard(), host="localhost:8080", origin=origin) == 403


async def test_our_own_pages_are_let_in():
    assert await status_of(guard(), host="localhost:8080", origin="http://localhost:8080") == 200


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_what_a_page_may_send_without_asking_is_refused(content_type):
    assert await status_of(guard(), method="POST", host="localhost", content_type=content_type) == 415


async def test_json_is_let_in():
    assert (
        await status_of(guard(), method="POST", host="localhost", content_type="application/json; charset=utf-8") == 200
    )


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \u00e9"])
async def test_without_the_token_nothing_is_answered(given):
    assert await status_of(guard(TOKEN), host="localhost", authorization=given) == 401


async def test_the_token_opens():
    assert await status_of(guard(TOKEN), host="localhost", authorization=f"Bearer {TOKEN}") == 200


async def test_whether_the_daemon_lives_may_be_asked_without_a_token():
    assert await status_of(guard(TOKEN), "/healthz", host="localhost") == 200


async def test_a_websocket_of_a_foreign_page_is_closed_before_it_opens():
    said = []

    async def send(message):
        said.append(message)

    async def receive():
        return {"type": "websocket.connect"}

    headers = [(b"host", b"localhost"), (b"origin", b"http://evil.example")]
    await guard()({"type": "websocket", "path": "/peerd/v1/session", "headers": headers}, receive, send)
    assert [message["type"] for message in said] == ["websocket.close"]
