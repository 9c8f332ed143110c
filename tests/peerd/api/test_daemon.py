"""The local API as programs use it: on real sockets, with common tools."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
import trio
import trio.lowlevel
from trio_websocket import ConnectionClosed, ConnectionRejected, wrap_client_stream

from peerd.api.http.connection import WRITE_S
from peerd.api.serve import load_or_create_token
from peerd.cli.watching.status import describe, show_status
from peerd.client.model import ModelFacts, SwarmModel
from peerd.local.messages import Embed, LocalBackward, LocalForward, LocalOpen, message_bytes, read_message
from peerd.protocol.encoding.tensors import TensorHeader, decode_tensor, encode_tensor
from peerd.protocol.errors import InvalidRequest, NoChain
from peerd.protocol.messages.session import Step
from peerd.protocol.rows import Fork, RowSlice
from peerd.protocol.span import Span
from peerd.testing.fake_engine import fake_forward
from tests.fakes.api_fixture import openai_client

pytestmark = pytest.mark.real_time

BLOCKS = 9
WIDTH = 8
PROMPT = [1, 2, 3]


@pytest.mark.parametrize("over", ["unix", "tcp"])
async def test_openai_s_own_client_completes_chats_and_streams(open_daemon, over):
    async with open_daemon() as daemon:

        def use(client):
            whole = client.completions.create(model="bytes", prompt=PROMPT, max_tokens=20, temperature=0)
            pieces = client.completions.create(model="bytes", prompt=PROMPT, max_tokens=20, temperature=0, stream=True)
            chat = client.chat.completions.create(
                model="bytes", messages=[{"role": "user", "content": "Hi"}], max_completion_tokens=5, logprobs=True
            )
            return whole, "".join(piece.choices[0].text for piece in pieces), chat, client.models.list()

        with openai_client(daemon, over) as client:
            whole, streamed, chat, models = await trio.to_thread.run_sync(use, client)
    assert whole.choices[0].text == streamed
    assert whole.usage.completion_tokens == 20
    assert chat.choices[0].finish_reason == "length"
    assert len(chat.choices[0].logprobs.content) == 5
    assert [model.id for model in models] == ["bytes"]


async def test_openai_s_asynchronous_client_streams(open_daemon):
    async with open_daemon() as daemon:

        async def use():
            http = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(daemon.socket)))
            async with openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="x", http_client=http) as client:
                stream = await client.chat.completions.create(
                    model="bytes",
                    messages=[{"role": "user", "content": "Hi"}],
                    max_tokens=7,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                return [chunk async for chunk in stream]

        chunks = await trio.to_thread.run_sync(lambda: asyncio.run(use()))
    assert chunks[-1].usage.completion_tokens == 7
    assert chunks[-2].choices[0].finish_reason == "length"


async def test_openai_s_client_raises_what_its_users_catch(open_daemon):
    async with open_daemon() as daemon:

        def use(client):
            complete = partial(client.completions.create, model="bytes", prompt=PROMPT)
            with pytest.raises(openai.BadRequestError) as caught:
                complete(max_tokens=5000)
            assert caught.value.code == "context_length_exceeded"
            with pytest.raises(openai.NotFoundError):
                complete(model="other")
            daemon.swarm.hosts[0].online = False
            with pytest.raises(openai.InternalServerError) as caught:
                complete()
            assert caught.value.status_code == 503

        with openai_client(daemon) as client:
            await trio.to_thread.run_sync(use, client)
        with openai_client(daemon, "tcp", token="wrong") as stranger, pytest.raises(openai.AuthenticationError):
            await trio.to_thread.run_sync(stranger.models.list)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_speaks_to_the_socket(open_daemon):
    async with open_daemon() as daemon:
        curl = ["curl", "-sS", "--unix-socket", str(daemon.socket)]
        asked = json.dumps({"model": "bytes", "prompt": PROMPT, "max_tokens": 3})
        posted = await trio.run_process(
            [*curl, "http://localhost/v1/completions", "--json", asked], capture_stdout=True
        )
        ready = await trio.run_process([*curl, "http://localhost/readyz"], capture_stdout=True)
        daemon.swarm.hosts[0].online = False
        gone = await trio.run_process([*curl, "http://localhost/readyz"], capture_stdout=True)
    assert json.loads(posted.stdout)["usage"]["completion_tokens"] == 3
    assert ready.stdout == b"ready\n"
    assert gone.stdout == b"bytes needs 3 more blocks: 0-2\n"


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_hanging_up_frees_the_session_on_every_peer(open_daemon, stream):
    async with open_daemon() as daemon:
        async with await trio.open_unix_socket(daemon.socket) as connection:
            await connection.send_all(asking({"stream": stream}))
            while not all(host.server.sessions for host in daemon.swarm.hosts):
                await trio.sleep(0.01)
        while any(host.server.sessions for host in daemon.swarm.hosts):
            await trio.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_an_answer_ends_the_connection_of_a_client_that_asked_for_that(open_daemon, stream):
    async with open_daemon() as daemon, await trio.open_unix_socket(daemon.socket) as connection:
        await connection.send_all(asking({"stream": stream, "max_tokens": 2}).replace(b"HTTP/1.1", b"HTTP/1.0"))
        answer = b"".join([bytes(chunk) async for chunk in connection])
    assert b" 200 " in answer


async def test_connections_that_programs_close_leave_no_descriptor(open_daemon):
    def sockets_open():
        found = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return sum(path.is_socket() for path in found)

    async with open_daemon() as daemon:
        before = sockets_open()
        for _ in range(30):
            async with await trio.open_unix_socket(daemon.socket):
                pass
        while sockets_open() > before:
            await trio.sleep(0.01)


async def test_a_client_that_reads_nothing_does_not_keep_the_daemon_alive(open_daemon):
    async with open_daemon() as daemon:
        connection = socket.socket(socket.AF_UNIX)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(str(daemon.socket))
        connection.sendall(asking({"stream": True, "n": 20}))
        await trio.sleep(0.5)
        leaving = trio.current_time()
    # Not for as long as a write may take.
    assert trio.current_time() - leaving < WRITE_S / 2
    connection.close()


async def test_status_is_shown_to_people_and_programs(open_daemon, capsys):
    async with open_daemon() as daemon:
        await show_status(daemon.socket, as_json=True)
        status = json.loads(capsys.readouterr().out)
        daemon.swarm.hosts[1].online = False
        await trio.lowlevel.checkpoint()
        with pytest.raises(NoChain, match="bytes needs 3 more blocks: 3-5"):
            await show_status(daemon.socket, as_json=False)
    assert status["models"][0]["covered"] is True
    assert status["models"][0]["coverage"] == [{"blocks": "0:9", "servers": 1}]
    said = capsys.readouterr().out
    assert "bytes: incomplete" in said
    assert "3:6 by no server" in said
    assert status["reachability"] == {"state": "private", "seen_at": ["6.6.6.6"], "why": "nobody can dial us"}
    assert describe(status)
    assert "reach     private, seen at 6.6.6.6: nobody can dial us" in said
    assert status["relayed_by"] == [{"peer_id": "the-relay", "addresses": ["/ip4/6.6.6.7/tcp/1/ws"]}]
    assert "relayed   by the-rela" in said
    relaying = {"slots": 0, "max_slots": 5, "circuits": 0, "max_circuits": 7, "passed_bytes": 0}
    assert status["relaying"] == relaying
    assert "relaying  for 0 of 5 peers, 0 of 7 connections" in said


@asynccontextmanager
async def open_tensors(daemon, **fields):
    """A tensor session, opened; `ask(message, tensor)` returns the answer's header and tensor."""
    async with trio.open_nursery() as nursery, await trio.open_unix_socket(daemon.socket) as stream:
        websocket = await wrap_client_stream(nursery, stream, "localhost", "/peerd/v1/session")

        async def ask(message, tensor=None, prompts=None):
            body = []
            for name, value in (("tensor", tensor), ("prompts", prompts)):
                if value is not None:
                    described, parts = encode_tensor(value)
                    message, body = replace(message, **{name: described.to_fields()}), body + parts
            await websocket.send_message(message_bytes(message, body))
            raw = read_message(await websocket.get_message())
            tensors, rest = [], bytearray(raw.body)
            for name in ("tensor", "prompts"):
                if raw.header.get(name) is not None:
                    described = TensorHeader.from_fields(raw.header[name], max_elements=2**24)
                    tensors.append(decode_tensor(described, rest[: described.body_bytes]))
                    rest = rest[described.body_bytes :]
            return (raw.header, *(tensors or [None]))

        said, _ = await ask(LocalOpen(**{"model": "bytes", "max_length": 64} | fields))
        yield SimpleNamespace(ask=ask, said=said, websocket=websocket)
        await websocket.aclose()


def asking(body):
    """A completion, as HTTP/1.1 says it."""
    data = json.dumps({"model": "bytes", "prompt": PROMPT, "max_tokens": 900} | body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


async def test_a_program_computes_hidden_states_rolls_back_and_forks(open_daemon):
    hidden = torch.arange(1, 7).float()[:, None].expand(-1, WIDTH).clone()
    async with open_daemon() as daemon, open_tensors(daemon, max_rows=2, max_rollback=8, end=6) as session:
        assert (session.said["end"], session.said["hidden_size"]) == (6, WIDTH)
        embedded, first = await session.ask(Embed(seq=1, token_ids=(1, 2, 3)))
        assert torch.equal(first, hidden[:3])
        header, out = await session.ask(Step(epoch=0, seq=2, rows=(RowSlice(0, 0, 3),), want="all"), first)
        assert header["rows"] == [[0, 0, 3]]
        assert torch.equal(out, fake_forward(hidden[:3], Span(0, 6)))
        _, again = await session.ask(Step(epoch=0, seq=3, rows=(RowSlice(0, 1, 5),), want="last"), hidden[1:])
        assert torch.equal(again, fake_forward(hidden, Span(0, 6))[-1:])
        step = Step(epoch=0, seq=4, rows=(RowSlice(1, 2, 1),), ops=(Fork(0, 1, 2),), want="last")
        _, forked = await session.ask(step, hidden[2:3])
        assert torch.equal(forked, fake_forward(hidden[:3], Span(0, 6))[-1:])
    assert embedded["seq"] == 1


async def test_a_mistake_costs_one_answer_and_not_the_session(open_daemon):
    wrong_width = torch.zeros(1, WIDTH + 1)
    async with open_daemon() as daemon, open_tensors(daemon) as session:
        said, _ = await session.ask(Step(epoch=0, seq=1, rows=(RowSlice(0, 0, 1),)), wrong_width)
        assert (said["type"], said["seq"], said["code"]) == ("error", 1, "invalid")
        said, _ = await session.ask(Step(epoch=0, seq=2, rows=(RowSlice(0, 5, 1),)), torch.zeros(1, WIDTH))
        assert said["type"] == "error"
        said, out = await session.ask(Step(epoch=0, seq=3, rows=(RowSlice(0, 0, 1),)), torch.zeros(1, WIDTH))
        assert (said["type"], out.shape) == ("output", (1, WIDTH))


@pytest.mark.parametrize(
    "data", [b"", b"\0\0\0\2\x81", b"junk" * 10, "text", message_bytes(Step(epoch=0, seq=1, rows=()))]
)
async def test_a_client_that_breaks_the_protocol_is_told_and_disconnected(open_daemon, data):
    async with (
        open_daemon() as daemon,
        trio.open_nursery() as nursery,
        await trio.open_unix_socket(daemon.socket) as stream,
    ):
        websocket = await wrap_client_stream(nursery, stream, "localhost", "/peerd/v1/session")
        await websocket.send_message(data)
        assert read_message(await websocket.get_message()).header["type"] == "error"
        with pytest.raises(ConnectionClosed):
            await websocket.get_message()


async def test_a_program_trains_through_the_websocket_as_through_the_library(
    open_swarm, serve_tiny, open_daemon_of_model
):
    generator = torch.Generator().manual_seed(1)
    hidden, grad = torch.randn(2, 9, 32, generator=generator)
    prompts = torch.randn(8, 1, 2, 32, generator=generator)
    async with open_swarm() as swarm:
        for blocks in (Span(0, 5), Span(5, 8)):
            await serve_tiny(swarm, blocks)
        client = await swarm.client()
        facts = ModelFacts("tiny", bytes(range(32)), 8, 32, 512, "float32")
        model = SwarmModel(facts, None, None, None, client.finder, client.opener, client.tasks)
        expected = await model.forward(hidden, rows=(5, 4), prompts=prompts)
        gradients = await expected.backward(grad)
        async with open_daemon_of_model(model, swarm) as daemon, open_tensors(daemon, max_length=1) as session:
            forward = LocalForward(seq=1, rows=(5, 4), tensor={}, keep=True)
            _, output = await session.ask(forward, hidden, prompts)
            said, grad_hidden, grad_prompts = await session.ask(LocalBackward(seq=2, of=1, tensor={}), grad)
            assert said["type"] == "gradients"
            again, _ = await session.ask(LocalBackward(seq=3, of=1, tensor={}), grad)
            wrong, _ = await session.ask(LocalForward(seq=4, rows=(5, 5), tensor={}), hidden)
    torch.testing.assert_close(output, expected.output)
    torch.testing.assert_close(grad_hidden, gradients.hidden)
    torch.testing.assert_close(grad_prompts, gradients.prompts)
    assert (again["code"], wrong["code"]) == ("invalid", "invalid")


async def test_a_tensor_session_ends_with_its_websocket(open_daemon):
    async with open_daemon() as daemon:
        async with open_tensors(daemon) as session:
            await session.ask(Step(epoch=0, seq=1, rows=(RowSlice(0, 0, 1),)), torch.zeros(1, WIDTH))
            assert all(host.server.sessions for host in daemon.swarm.hosts)
        while any(host.server.sessions for host in daemon.swarm.hosts):
            await trio.sleep(0.01)


async def test_a_web_page_of_another_origin_gets_no_websocket(open_daemon):
    evil = [(b"Origin", b"http://evil.example")]
    async with open_daemon() as daemon, await trio.open_unix_socket(daemon.socket) as stream:
        with pytest.RaisesGroup(ConnectionRejected, flatten_subgroups=True, allow_unwrapped=True):
            async with trio.open_nursery() as nursery:
                await wrap_client_stream(nursery, stream, "localhost", "/peerd/v1/session", extra_headers=evil)


def test_the_token_is_made_once_and_is_its_owner_s_alone(tmp_path):
    path = tmp_path / "state" / "api.token"
    token = load_or_create_token(path)
    assert len(token) > 30
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_token(path) == token


def test_a_token_file_that_is_none_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match="cannot be read: Is a directory"):
        load_or_create_token(tmp_path)
    (tmp_path / "api.token").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match="holds no token"):
        load_or_create_token(tmp_path / "api.token")


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
async def test_a_program_in_node_reads_hidden_states(open_daemon):
    script = Path(__file__).parents[3] / "examples/node/hidden_states.mjs"
    if not (script.parent / "node_modules").is_dir():
        pytest.skip("examples/node has no node_modules: npm install there")
    async with open_daemon() as daemon:
        command = ["node", str(script), "--socket", str(daemon.socket), "--model", "bytes", "--tokens", "1,2,3"]
        ran = await trio.run_process([*command, "--end", "6"], capture_stdout=True)
    hidden = torch.tensor([1.0, 2.0, 3.0])[:, None].expand(-1, WIDTH)
    assert json.loads(ran.stdout) == fake_forward(hidden, Span(0, 6)).tolist()
