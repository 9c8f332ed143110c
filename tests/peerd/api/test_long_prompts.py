"""A request that takes long to compute must not stop the event loop: peers and other answers wait for it."""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from peerd.api.app import Api
from peerd.api.fields import body_limit
from peerd.api.models import Models
from peerd.api.openai.answering import Answering
from peerd.api.openai.chat_templates import MOST_OF_A_TEMPLATE, RENDER_LIMIT_S, ChatTemplates
from peerd.api.web.history import History
from peerd.exchange.sampler import Sampler
from peerd.protocol.errors import InvalidRequest
from tests.peerd.api.conftest import ByteHead, Caller, InProcessTemplates, NoStatus

LONG = "word " * 4000


class ThreadedHead(ByteHead):
    """Computes in worker threads, as the daemon's own does."""

    async def in_thread(self, function, *arguments, limiter=None):
        return await trio.to_thread.run_sync(function, *arguments, limiter=limiter)


@pytest.fixture
def open_api_with_model(open_byte_model):
    """`async with open_api_with_model(head) as (caller, model):` the application over `model`."""

    @asynccontextmanager
    async def open_it(head=None):
        async with open_byte_model(head) as (model, _):
            api = Api(Models({"bytes": model}), InProcessTemplates(), NoStatus(), NoStatus(), History(), Answering())
            yield Caller(api.app()), model

    return open_it


def asking(path, text):
    asked = {"model": "bytes", "max_tokens": 2}
    is_chat = path == "/v1/chat/completions"
    return asked | ({"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_text_that_no_context_can_hold_is_refused_before_it_is_tokenized(
    open_api_with_model, path, monkeypatch
):
    async with open_api_with_model() as (caller, model):

        def fail(*arguments, **options):
            raise AssertionError("tokenized")

        monkeypatch.setattr(type(model.tokenizer), "encode", fail)
        answer = await caller.post(path, asking(path, LONG))
    assert (answer.status, answer.json["error"]["code"]) == (400, "context_length_exceeded")
    assert "1024 tokens" in answer.json["error"]["message"]


@pytest.mark.real_time
async def test_texts_are_tokenized_and_tokens_chosen_beside_the_event_loop(open_api_with_model, monkeypatch):
    threads = {}

    def noting(kind, name):
        function = getattr(kind, name)

        def noted(*arguments, **options):
            threads.setdefault(name, set()).add(threading.get_ident())
            return function(*arguments, **options)

        monkeypatch.setattr(kind, name, noted)

    async with open_api_with_model(ThreadedHead()) as (caller, model):
        noting(type(model.tokenizer), "encode")
        noting(Sampler, "pick")
        answer = await caller.post("/v1/completions", asking("/v1/completions", "Hi"))
    assert answer.status == 200
    assert threads.keys() == {"encode", "pick"}
    assert all(threading.get_ident() not in where for where in threads.values())


@pytest.mark.parametrize(("context", "limit"), [(2048, 2**21), (65536, 2**22), (10**6, 2**23)])
def test_a_body_may_be_as_long_as_the_longest_context_needs(context, limit):
    assert body_limit([1024, context]) == limit


class Renderer:
    """Renders `endless` until the time is over, anything else at once."""

    async def render(self, asked):
        await trio.lowlevel.checkpoint()
        if b"endless" in asked:
            await trio.sleep(RENDER_LIMIT_S)
            raise InvalidRequest("did not end")
        return {"text": "rendered"}

    async def close(self):
        await trio.lowlevel.checkpoint()


async def test_a_template_that_loops_delays_only_its_own_model():
    templates = ChatTemplates(Renderer)
    ended = []

    async def ask():
        with pytest.raises(InvalidRequest):
            await templates.render("endless", [], {})
        ended.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        for _ in range(2 * MOST_OF_A_TEMPLATE):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert await templates.render("plain", [], {}) == "rendered"
        assert trio.current_time() == began
    assert [round(at - began) for at in ended] == [1] * MOST_OF_A_TEMPLATE + [2] * MOST_OF_A_TEMPLATE
