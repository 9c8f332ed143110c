"""What the log says of requests."""

from __future__ import annotations

import json
import logging

import pytest

from peerd.api.error_shapes import error_response
from peerd.api.errors import invalid
from peerd.api.http.request_log import RequestLog
from tests.peerd.api.conftest import Caller

SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions"}


async def nothing():
    raise AssertionError("nobody reads the request")


async def unheard(message):
    pass


async def refuse(scope, receive, send):
    error = invalid("temprature is not a known parameter: SECRET", "temprature", code="unknown_parameter")
    await error_response(error, scope["path"])(scope, receive, send)


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps({"error": {"code": "SECRET"}}).encode()})


async def hang_up(scope, receive, send):
    pass


@pytest.mark.parametrize(
    ("app", "said"),
    [
        (refuse, "POST /v1/completions: 400 (unknown_parameter, temprature) after 0.000 s"),
        (answer, "POST /v1/completions: 200 after 0.000 s"),
        (hang_up, "POST /v1/completions: hung up after 0.000 s"),
    ],
    ids=["refused", "answered", "hung up"],
)
async def test_a_request_is_a_line_without_its_text(caplog, app, said):
    with caplog.at_level(logging.DEBUG, RequestLog.__module__):
        await RequestLog(app)(dict(SCOPE), nothing, unheard)
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/api/chat"])
async def test_the_field_that_was_refused_is_named_whatever_the_error_s_form(caplog, path):
    async def refuse_forgery(scope, receive, send):
        await error_response(invalid("no", "a\nforged \x1b[31m"), path)(scope, receive, send)

    with caplog.at_level(logging.DEBUG, RequestLog.__module__):
        await RequestLog(refuse_forgery)(SCOPE | {"path": path}, nothing, unheard)
    assert [record.getMessage() for record in caplog.records] == [
        f"POST {path}: 400 (a\ufffdforged \ufffd[31m) after 0.000 s"
    ]


async def test_an_endpoint_s_refusal_reaches_the_log(caplog, open_api):
    async with open_api() as (caller, _):
        with caplog.at_level(logging.DEBUG, RequestLog.__module__):
            await Caller(RequestLog(caller._app)).post(
                "/v1/messages", {"model": "bytes", "max_tokens": 1, "messages": 3}
            )
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("POST /v1/messages: 400 (invalid_value, messages) after ")


async def test_nothing_is_logged_unless_debugging_is_on(caplog):
    with caplog.at_level(logging.INFO, RequestLog.__module__):
        await RequestLog(refuse)(dict(SCOPE), nothing, unheard)
    assert not caplog.records
