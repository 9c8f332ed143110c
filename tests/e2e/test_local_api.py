"""`peerd --client` as a user starts it: a process, a socket, the real model."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import trio

from peerd.cli.processes import open_peer_processes

pytestmark = [pytest.mark.real_time, pytest.mark.model, pytest.mark.processes]

QUESTION = "What is the capital of France?"


async def ask(socket, path, body=None):
    """One request over the socket: status and body."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.0",
        "Host: localhost",
        "Content-Type: application/json",
    ]
    async with await trio.open_unix_socket(socket) as stream:
        await stream.send_all("\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data)
        answer = b"".join([bytes(chunk) async for chunk in stream])
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), rest


async def test_a_daemon_of_its_own_answers_as_transformers_does(model_path, reference, tmp_path):
    socket = tmp_path / "peerd.sock"
    expected = reference.answer(reference.encode(QUESTION, chat=True), 12)
    # One that is killed would leave its socket.
    async with open_peer_processes(threads=1, stop_s=30) as processes:
        bootstrap = await processes.start()
        join = ["--bootstrap", str(bootstrap.address)]
        client = ["--client", "--model", f"smol={model_path}", "--socket", str(socket), *join]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(processes.start, *client)
            exact = ("--serve-blocks", "auto", "--model", str(model_path), "--quantize", "none")
            nursery.start_soon(processes.start, *exact, *join)
        # How soon a new server is used is tested in simulated time.
        while (await ask(socket, "/readyz"))[0] != 200:
            await trio.sleep(0.2)
        assert await ask(socket, "/readyz") == (200, b"ready\n")
        request = {"model": "smol", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        status, body = await ask(socket, "/v1/chat/completions", request | {"max_tokens": 12})
        assert status == 200
        text = json.loads(body)["choices"][0]["message"]["content"]
        decisive = reference.tokenizer.decode(expected.decisive, skip_special_tokens=True)
        assert text.startswith(decisive)
        assert decisive
        forced = request | {"max_tokens": 20, "structured_outputs": {"choice": ["Rome", "Paris", "Oslo"]}}
        status, body = await ask(socket, "/v1/chat/completions", forced)
        choice = json.loads(body)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Paris", "stop")
        prompt = reference.encode(f"{QUESTION} It is Paris.")
        scored = {"model": "smol", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
        status, body = await ask(socket, "/v1/completions", scored)
        scores = json.loads(body)["choices"][0]["logprobs"]["token_logprobs"]
        with torch.no_grad():
            logits = reference.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert scores[1:] == pytest.approx(
            logits[:-1].gather(1, torch.tensor(prompt)[1:, None])[:, 0].tolist(), abs=1e-3
        )
        shown = await trio.run_process(
            [sys.executable, "-m", "peerd", "status", "--socket", str(socket)], capture_stdout=True
        )
        assert b"smol: complete, 1 server (0:30 by 1)" in shown.stdout
        second = await trio.run_process(
            [sys.executable, "-m", "peerd", *client, "--identity", str(tmp_path / "key")],
            check=False,
            capture_stderr=True,
        )
        assert second.returncode == 2
        assert b"another peerd listens" in second.stderr
    assert not socket.exists()
