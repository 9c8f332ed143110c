"""Which requests may use the local API."""

from __future__ import annotations

import json

import pytest
from starlette.responses import PlainTextResponse

from peerd.api.guard import Admission, Guard

TOKEN = "t" * 40


async def status_of(guard, path="/v1/models", method="GET", **headers):
    """The status a request gets, 200 where it is let through."""
    return (await answer_of(guard, path, method, **headers))[0]["status"]


async def answer_of(guard, path="/v1/models", method="GET", client=("127.0.0.1", 1), **headers):
    """The messages of the answer."""
    said = []

    async def send(message):
        said.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b"", "client": client}
    await guard(scope, receive, send)
    return said


def guard(token=None, names=(), origins=(), token_file=None):
    admission = Admission(token, token_file, frozenset(names), frozenset(origins))
    return Guard(PlainTextResponse("in"), admission)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "LOCALHOST", "peerd", "127.0.0.1:1", "[::1]:8080", "192.168.1.5:8080"]
)
async def test_our_own_names_and_plain_addresses_are_let_in(host):
    assert await status_of(guard(), host=host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "",
        "127.0.0.1.evil.example:80",
        "[::1",
        "evil.com@localhost",
        "localhost#.evil.com",
        "localhost/evil.com",
        "localhost:evil.com",
        "localhost:8080 ",
    ],
)
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


async def test_clients_of_ollama_s_need_not_name_the_type_of_a_body_if_they_have_the_token():
    asked = {"method": "POST", "host": "localhost", "content_type": "text/plain"}
    token = {"authorization": f"Bearer {TOKEN}"}
    assert await status_of(guard(TOKEN), "/api/chat", **asked, **token) == 200
    assert await status_of(guard(TOKEN), "/api/chat", **asked) == 401
    assert await status_of(guard(), "/api/chat", **asked) == 415
    assert await status_of(guard(TOKEN), "/v1/chat/completions", **asked, **token) == 415


async def test_json_is_let_in():
    assert (
        await status_of(guard(), method="POST", host="localhost", content_type="application/json; charset=utf-8") == 200
    )


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \u00e9"])
async def test_without_the_token_nothing_is_answered(given):
    assert await status_of(guard(TOKEN), host="localhost", authorization=given) == 401


async def test_the_token_opens():
    assert await status_of(guard(TOKEN), host="localhost", authorization=f"Bearer {TOKEN}") == 200


async def test_the_token_opens_as_anthropic_s_clients_send_it():
    assert await status_of(guard(TOKEN), host="localhost", x_api_key=TOKEN) == 200
    assert await status_of(guard(TOKEN), host="localhost", x_api_key="wrong") == 401


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"type": "error", "error": {"type": "authentication_error"}}),
        ("/v1/messages/count_tokens", {"type": "error", "error": {"type": "authentication_error"}}),
        ("/api/chat", {}),
    ],
)
async def test_who_lacks_the_token_is_told_so_in_the_form_of_the_api_that_was_asked(path, body):
    start, said = await answer_of(guard(TOKEN), path, host="localhost")
    found = json.loads(said["body"])
    assert start["status"] == 401
    message = found["error"].pop("message") if body else found.pop("error")
    assert "a token is needed" in message
    assert found == body


@pytest.mark.parametrize("path", ["/health", "/healthz"])
async def test_whether_the_daemon_lives_may_be_asked_without_a_token(path):
    assert await status_of(guard(TOKEN), path, host="localhost") == 200


async def test_a_websocket_of_a_foreign_page_is_closed_before_it_opens():
    said = []

    async def send(message):
        said.append(message)

    async def receive():
        return {"type": "websocket.connect"}

    headers = [(b"host", b"localhost"), (b"origin", b"http://evil.example")]
    await guard()({"type": "websocket", "path": "/peerd/v1/session", "headers": headers}, receive, send)
    assert [message["type"] for message in said] == ["websocket.close"]


async def test_pages_of_an_origin_that_the_operator_allows_may_ask_and_read():
    allowing = guard(TOKEN, origins=["http://localhost:3000"])
    asked = {"host": "localhost:8080", "origin": "http://localhost:3000"}
    preflight, _ = await answer_of(allowing, method="OPTIONS", **asked)
    headers = dict(preflight["headers"])
    assert preflight["status"] == 204
    assert headers[b"access-control-allow-origin"] == b"http://localhost:3000"
    assert b"Authorization" in headers[b"access-control-allow-headers"]
    answer = (await answer_of(allowing, authorization=f"Bearer {TOKEN}", **asked))[0]
    assert answer["status"] == 200
    assert dict(answer["headers"])[b"access-control-allow-origin"] == b"http://localhost:3000"
    assert await status_of(allowing, **asked) == 401
    assert await status_of(allowing, host="localhost:8080", origin="http://localhost:3001") == 403


@pytest.mark.parametrize(
    ("wanted", "allowed"),
    [
        ("authorization,content-type,x-stainless-os", "authorization,content-type,x-stainless-os"),
        ("x-stainless-os, x-stainless-arch", "x-stainless-os, x-stainless-arch"),
        ("x\r\nset-cookie: a", "Authorization, Content-Type"),
        (",".join(["x-a"] * 65), "Authorization, Content-Type"),
    ],
    ids=["OpenAI's", "spaces", "no names", "too many"],
)
async def test_pages_of_an_allowed_origin_may_send_the_headers_that_they_ask_for(wanted, allowed):
    allowing = guard(TOKEN, origins=["http://localhost:3000"])
    asked = {"host": "localhost:8080", "access_control_request_headers": wanted}
    [preflight, _] = await answer_of(allowing, method="OPTIONS", origin="http://localhost:3000", **asked)
    assert dict(preflight["headers"])[b"access-control-allow-headers"] == allowed.encode()
    assert await status_of(allowing, method="OPTIONS", origin="http://localhost:3001", **asked) == 403


async def test_no_page_is_allowed_unless_the_operator_says_so():
    [start, _] = await answer_of(guard(), host="localhost:8080", origin="http://localhost:8080")
    assert not any(name.startswith(b"access-control") for name, _ in start["headers"])


async def test_who_lacks_the_token_is_told_where_it_lies_if_they_are_on_this_machine(tmp_path):
    strict = guard(TOKEN, token_file=tmp_path / "api.token")
    _, missing = await answer_of(strict, host="localhost")
    _, wrong = await answer_of(strict, host="localhost", authorization="Bearer x")
    _, remote = await answer_of(strict, client=("192.0.2.1", 1), host="localhost")
    assert b"a token is needed" in missing["body"]
    assert b"the token is wrong" in wrong["body"]
    assert str(tmp_path).encode() in missing["body"]
    assert str(tmp_path).encode() not in remote["body"]
