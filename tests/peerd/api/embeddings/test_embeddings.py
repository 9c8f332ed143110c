"""Embeddings and token ids: forms, limits, errors, and the same vectors as Transformers."""

from __future__ import annotations

import base64
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import ollama
import pytest
import torch
import trio
from transformers import AutoModel

from peerd.api.embeddings import endpoints, pooling
from peerd.client.model import ModelFacts, SwarmModel
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.model.head import load_head
from peerd.exchange.head_task import HeadTask
from peerd.protocol.span import Span
from peerd.testing.fake_engine import fake_forward
from tests.fakes.api_fixture import TOKEN, openai_client

PATH = "/v1/embeddings"
BLOCKS = 9
WIDTH = 8


def ask(**fields):
    return {"model": "bytes", "input": [1, 2, 3]} | fields


def foretold(ids):
    """The vector of a text by the fake blocks, whose head norms nothing."""
    hidden = torch.tensor(ids).float()[:, None].expand(-1, WIDTH)
    return torch.nn.functional.normalize(fake_forward(hidden, Span(0, BLOCKS)).float().mean(0), dim=0)


@pytest.fixture
def fake_passes(monkeypatch):
    """Forward passes as the fake blocks compute them: fake engines run sessions only."""

    @contextmanager
    def done(output):
        yield SimpleNamespace(output=output)

    async def forward(self, hidden, *, rows, keep, patience):
        assert not keep
        await trio.lowlevel.checkpoint()
        return done(torch.cat([fake_forward(part, Span(0, BLOCKS)) for part in torch.split(hidden, rows)]))

    monkeypatch.setattr(SwarmModel, "forward", forward)


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("Hi", [[72, 105]]),
        ([1, 2, 3], [[1, 2, 3]]),
        (["Hi", "\u00e9"], [[72, 105], [195, 169]]),
        ([[1, 2, 3], [7]], [[1, 2, 3], [7]]),
    ],
    ids=["text", "ids", "texts", "lists of ids"],
)
async def test_each_text_has_its_vector(open_api, fake_passes, given, texts):
    async with open_api() as (caller, _):
        answer = await caller.post(PATH, ask(input=given))
    assert answer.status == 200, answer.body
    assert (answer.json["object"], answer.json["model"]) == ("list", "bytes")
    assert [entry["index"] for entry in answer.json["data"]] == list(range(len(texts)))
    tokens = sum(map(len, texts))
    assert answer.json["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    for entry, ids in zip(answer.json["data"], texts, strict=True):
        torch.testing.assert_close(torch.tensor(entry["embedding"]), foretold(ids))


async def test_vectors_come_as_bytes_if_the_client_wants_that(open_api, fake_passes):
    async with open_api() as (caller, _):
        answer = await caller.post(PATH, ask(encoding_format="base64", user="u"))
    vector = np.frombuffer(base64.b64decode(answer.json["data"][0]["embedding"]), "<f4")
    torch.testing.assert_close(torch.tensor(vector), foretold([1, 2, 3]))


async def test_many_texts_go_through_the_blocks_in_several_passes(open_api, fake_passes, monkeypatch):
    texts = [[number + 1] * (number + 1) for number in range(6)]
    async with open_api() as (caller, _):
        whole = await caller.post(PATH, ask(input=texts))
        monkeypatch.setattr(pooling, "_POSITIONS_AT_ONCE", 4)
        parts = await caller.post(PATH, ask(input=texts))
    assert parts.json == whole.json


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[1], [999]]}, "input[1]"),
        ({"input": ["a", "b" * 1025]}, "input[1]"),
        ({"input": "b" * 1025}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 4}, "dimensions"),
        ({"truncate": True}, "truncate"),
    ],
)
async def test_a_field_that_is_wrong_is_named_before_any_peer_is_asked(open_api, fields, param):
    async with open_api() as (caller, swarm):
        answer = await caller.post(PATH, ask(**fields))
        assert all(not host.task.engine.positions_computed for host in swarm.hosts)
    assert (answer.status, answer.json["error"]["param"]) == (400, param)
    assert param in answer.json["error"]["message"]


async def test_more_than_there_is_room_for_is_refused(open_api, fake_passes, monkeypatch):
    monkeypatch.setattr(endpoints, "MAX_TOKENS", 5)
    monkeypatch.setattr(endpoints, "_MOST_NUMBERS", WIDTH * 3)
    async with open_api() as (caller, _):
        tokens = await caller.post(PATH, ask(input=["abc", "def"]))
        texts = await caller.post(PATH, ask(input=["a"] * 4))
        fits = await caller.post(PATH, ask(input=["abc", "de"]))
    assert "more than 5 tokens" in tokens.json["error"]["message"]
    assert "more than 3 texts" in texts.json["error"]["message"]
    assert (tokens.status, texts.status, fits.status) == (400, 400, 200)


async def test_blocks_that_nobody_serves_are_a_503(open_api):
    async with open_api() as (caller, swarm):
        swarm.hosts[1].online = False
        answer = await caller.post(PATH, ask())
    assert answer.status == 503
    assert "3:6" in answer.json["error"]["message"]


async def test_a_client_that_hangs_up_ends_the_work(open_api, monkeypatch):
    begun, ended = trio.Event(), trio.Event()

    async def work(model, texts):
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    monkeypatch.setattr(endpoints, "mean_pooled", work)
    async with open_api() as (caller, _), trio.open_nursery() as nursery:
        hang_up = trio.Event()
        nursery.start_soon(partial(caller.post, hang_up=hang_up), PATH, ask())
        await begun.wait()
        hang_up.set()
        with trio.fail_after(1):
            await ended.wait()


@pytest.mark.real_time
async def test_vectors_are_the_normalised_means_of_transformers_last_hidden_states(
    open_swarm, serve_tiny, tiny_llama, open_daemon_of_model, byte_tokenizer
):
    texts = [[3, 14, 15, 9, 2, 6], [5], list(range(1, 40))]
    with open_checkpoint(tiny_llama) as checkpoint:
        head = HeadTask(load_head(checkpoint))
    async with open_swarm() as swarm:
        for blocks in (Span(0, 5), Span(5, 8)):
            await serve_tiny(swarm, blocks)
        client = await swarm.client()
        facts = ModelFacts("tiny", bytes(range(32)), 8, 32, 512, "float32")
        model = SwarmModel(facts, head, byte_tokenizer, None, client.finder, client.opener, client.tasks)
        async with open_daemon_of_model(model, swarm) as daemon:
            with openai_client(daemon) as programs:
                made = await trio.to_thread.run_sync(partial(programs.embeddings.create, model="bytes", input=texts))
    reference = AutoModel.from_pretrained(tiny_llama).eval()
    for entry, ids in zip(made.data, texts, strict=True):
        with torch.no_grad():
            mean = reference(torch.tensor([ids])).last_hidden_state[0].mean(0)
        expected = torch.nn.functional.normalize(mean, dim=0)
        torch.testing.assert_close(torch.tensor(entry.embedding), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.real_time
async def test_ollama_s_client_gets_the_same_vectors(open_daemon, fake_passes):
    async with open_daemon() as daemon:

        def use(client):
            return client.embed("bytes", ["Hi", "Ho"]), client.embeddings("bytes", "Hi")

        with ollama.Client(daemon.url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            made, older = await trio.to_thread.run_sync(use, client)
    torch.testing.assert_close(torch.tensor(made.embeddings[0]), foretold([72, 105]))
    assert made.prompt_eval_count == 4
    assert older.embedding == made.embeddings[0]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/api/embed", {"input": [1, 2]}, "input"),
        ("/api/embed", {"input": "a", "dimensions": 3}, "dimensions"),
        ("/api/embeddings", {}, "prompt"),
        ("/api/embeddings", {"prompt": "a", "options": 3}, "options"),
    ],
)
async def test_ollama_s_clients_are_told_what_is_wrong_in_their_form(open_api, path, fields, param):
    async with open_api() as (caller, _):
        answer = await caller.post(path, {"model": "bytes"} | fields)
    assert answer.status == 400
    assert answer.json["error"].startswith(f"{param} ")


async def test_a_text_becomes_token_ids_and_they_become_the_text(open_api):
    async with open_api() as (caller, swarm):
        ids = (await caller.post("/tokenize", {"prompt": "Hi \u00e9", "return_token_strs": True})).json
        text = (await caller.post("/detokenize", {"model": "bytes", "tokens": [*ids["tokens"], 256]})).json
        nothing = (await caller.post("/detokenize", {"tokens": []})).json
        assert all(not host.task.engine.positions_computed for host in swarm.hosts)
    assert ids["tokens"] == list("Hi \u00e9".encode())
    assert (ids["count"], ids["max_model_len"], ids["token_strs"][:2]) == (5, 1024, ["H", "i"])
    assert (text, nothing) == ({"prompt": "Hi \u00e9<end>"}, {"prompt": ""})


async def test_a_chat_becomes_the_token_ids_that_the_model_reads(open_api):
    messages = [{"role": "user", "content": "Hi"}]
    async with open_api() as (caller, _):
        usual = (await caller.post("/tokenize", {"messages": messages})).json
        closed = (await caller.post("/tokenize", {"messages": messages, "add_generation_prompt": False})).json
    assert bytes(usual["tokens"]) == b"<user>Hi<assistant>"
    assert bytes(closed["tokens"]) == b"<user>Hi"
    assert usual["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "temperature": 1}, 400, "temperature"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ("/tokenize", {"messages": [{"role": "user", "content": ""}], "add_special_tokens": True}, 400, None),
        ("/tokenize", {"model": "other", "prompt": "a"}, 404, "model"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, 257]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
    ],
)
async def test_what_is_no_text_and_no_token_is_refused(open_api, path, fields, status, param):
    async with open_api() as (caller, _):
        answer = await caller.post(path, fields)
    assert (answer.status, answer.json["error"]["param"]) == (status, param or "add_special_tokens")
