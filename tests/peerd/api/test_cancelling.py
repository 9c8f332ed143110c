"""A request that is ended by its name, from another connection."""

from __future__ import annotations

import json
from functools import partial

import pytest
import trio

from tests.peerd.api.conftest import Answer

ASKED = {"model": "bytes", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 900}
PATHS = {
    "/v1/chat/completions": ASKED,
    "/v1/completions": {"model": "bytes", "prompt": "Hi", "max_tokens": 900},
    "/v1/messages": ASKED,
    "/v1/responses": {"model": "bytes", "input": "Hi", "max_output_tokens": 900},
    "/api/chat": {"model": "bytes", "messages": ASKED["messages"], "options": {"num_predict": 900}},
}


async def cancel_after(caller, path, asked, request_id=None):
    """The answer to a request that is cancelled while it is under way, and the answers to two cancellations."""
    async with trio.open_nursery() as nursery:
        answer = await nursery.start(begin, caller, path, asked, request_id)
        await trio.sleep(0.5)
        name = request_id or answer.headers["x-request-id"]
        cancelled = await caller.post(f"/v1/requests/{name}/cancel", {})
        await answer.ended.wait()
    return answer, cancelled, await caller.post(f"/v1/requests/{name}/cancel", {})


async def begin(caller, path, asked, request_id, task_status):
    answer = Answer()
    task_status.started(answer)
    headers = [(b"x-request-id", request_id.encode())] if request_id else []
    await caller.post(path, asked, answer=answer, headers=headers)
    answer.ended.set()


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_that_is_cancelled_ends_with_an_error_and_frees_its_sessions(open_api, path):
    async with open_api() as (caller, swarm):
        answer, cancelled, again = await cancel_after(caller, path, PATHS[path] | {"stream": True})
        await trio.sleep(1)
        assert all(not host.server.sessions for host in swarm.hosts)
    assert (answer.status, cancelled.status, again.status) == (200, 200, 404)
    assert cancelled.json == {"id": answer.headers["x-request-id"], "cancelled": True}
    last = answer.body.decode().strip().splitlines()[-1]
    assert "the request was cancelled" in last


async def test_a_whole_answer_is_cancelled_by_the_name_that_its_client_gave(open_api):
    async with open_api() as (caller, _):
        answer, cancelled, _ = await cancel_after(caller, "/v1/chat/completions", ASKED, "mine-1")
    assert (answer.status, answer.json["error"]["code"]) == (409, "cancelled")
    assert answer.headers["x-request-id"] == "mine-1"
    assert cancelled.json["id"] == "mine-1"


async def test_the_id_in_an_answer_names_its_request(open_api):
    async with open_api() as (caller, _):
        short = await caller.post("/v1/chat/completions", ASKED | {"max_tokens": 2})
    assert short.headers["x-request-id"] == short.json["id"]


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, "a\nb"])
async def test_a_name_that_is_none_is_not_repeated(open_api, name):
    async with open_api() as (caller, _):
        headers = [(b"x-request-id", name.encode())]
        answer = await caller.post("/v1/chat/completions", ASKED | {"max_tokens": 1}, headers=headers)
    assert answer.headers["x-request-id"] == json.loads(answer.body)["id"]


async def test_a_name_that_is_in_use_stays_the_first_request_s(open_api):
    async with open_api() as (caller, _), trio.open_nursery() as nursery:
        first = await nursery.start(begin, caller, "/v1/chat/completions", ASKED, "mine")
        await trio.sleep(0.3)
        second = partial(caller.post, headers=[(b"x-request-id", b"mine")])
        assert (await second("/v1/chat/completions", ASKED | {"max_tokens": 1})).status == 200
        assert (await caller.post("/v1/requests/mine/cancel", {})).status == 200
        await first.ended.wait()
    assert first.status == 409
