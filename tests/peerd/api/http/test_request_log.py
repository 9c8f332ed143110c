"""What the log says of requests."""

from __future__ import annotations

import json
import logging

import pytest

from peerd.api.error_shapes import error_response
from peerd.api.errors import invalid
from peerd.api.http.request_log import RequestLog

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
        await RequestLog(app)(SCOPE, nothing, unheard)
    assert [record.getMessage() for record in caplog.records] == [said]


async def test_nothing_is_logged_unless_debugging_is_on(caplog):
    with caplog.at_level(logging.INFO, RequestLog.__module__):
        await RequestLog(refuse)(SCOPE, nothing, unheard)
    assert not caplog.records
