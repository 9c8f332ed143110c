"""An API over an in-memory swarm whose model says what its fake blocks compute."""

from __future__ import annotations

import copy
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from types import SimpleNamespace

import pytest
import torch
import trio
from transformers import GenerationConfig

from peerd.api.app import Api
from peerd.api.models import Models
from peerd.api.openai.answering import Answering
from peerd.api.serve import Endpoint, open_local_api
from peerd.api.web.history import History
from peerd.client.model import ModelFacts, SwarmModel
from peerd.meters import Meters
from peerd.net.containment import Containment
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.relay import Reserved
from peerd.reach.checker import ReachReport
from peerd.reach.relay import Relay
from peerd.reach.relay_ledger import RelayLimits
from peerd.reach.reservations import Reservation
from peerd.routing.dht.table import Contact
from peerd.routing.failures.track_record import TrackRecord
from peerd.routing.reach.verdict import Reach
from tests.fakes.api_fixture import TOKEN

WIDTH = 8
BLOCKS = 9
MAX_LENGTH = 1024
END = 256
RELAY = PeerId("the-relay")
TERMS = Reserved(expires_s=60, circuits=1, bytes_a_second=1, circuit_s=60)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{{ '/no_think' if enable_thinking is false }}{{ '<assistant>' if add_generation_prompt }}"
)


class ByteHead:
    """Embeds a token as its number, eight times; the most likely next token is the first value that comes back."""

    vocab_size = END + 1

    def embed(self, token_ids, start=0):
        if not all(0 <= token <= END for token in token_ids):
            raise InvalidRequest(f"tokens are 0 to {END}, not {token_ids}")
        return torch.tensor(list(token_ids)).float()[:, None].expand(-1, WIDTH).clone()

    async def logits(self, hidden, most=None):
        await trio.lowlevel.checkpoint()
        return 5 * torch.nn.functional.one_hot(hidden[:, 0].long(), END + 1).float()

    async def last_hidden(self, hidden):
        await trio.lowlevel.checkpoint()
        return hidden.float()

    async def in_thread(self, function, *arguments, limiter=None):
        await trio.lowlevel.checkpoint()
        return function(*arguments)


class ScriptedHead(ByteHead):
    """Each row says the given text, whatever comes back, by its position, which the hidden states do not contain."""

    def __init__(self, text):
        self._script = [*text.encode(), END]
        self._said = 0

    async def logits(self, hidden, most=None):
        await trio.lowlevel.checkpoint()
        token = self._script[min(self._said, len(self._script) - 1)]
        self._said += 1
        return 5 * torch.nn.functional.one_hot(torch.tensor([token] * len(hidden)), END + 1).float()


class SoftHead(ByteHead):
    """Finds letters and quotes likely and spaces unlikely, each text differently: an answer may be anything."""

    def embed(self, token_ids, start=0):
        positions = torch.arange(start, start + len(token_ids))[:, None]
        return super().embed(token_ids) * 1000 + positions

    async def logits(self, hidden, most=None):
        await trio.lowlevel.checkpoint()
        scores = torch.stack(
            [torch.randn(END + 1, generator=torch.Generator().manual_seed(int(row[0]))) for row in hidden]
        )
        scores[:, [9, 10, 13, 32]] -= 9
        return scores


@pytest.fixture
def soft_head():
    """A head under which an answer may be anything."""
    return SoftHead()


@pytest.fixture
def open_byte_model(open_swarm, byte_tokenizer):
    """`async with open_byte_model(head) as (model, swarm):` three servers and a client's model."""

    @asynccontextmanager
    async def open_it(head=None, generation_config=None, chat_template=TEMPLATE, grammar_check=None, **serving):
        async with open_swarm() as swarm:
            for start in range(0, BLOCKS, 3):
                await swarm.serve(start, start + 3, **serving)
            client = await swarm.client()
            tokenizer = copy.copy(byte_tokenizer)
            tokenizer.chat_template = chat_template
            facts = ModelFacts("bytes", bytes(range(32)), BLOCKS, WIDTH, MAX_LENGTH, "float32")
            config = generation_config or GenerationConfig(eos_token_id=END, do_sample=False)
            ways = client.finder, client.opener, client.tasks
            model = SwarmModel(facts, head or ByteHead(), tokenizer, config, *ways, grammar_check=grammar_check)
            if isinstance(head, ScriptedHead):
                # It counts calls, not positions.
                model.speculation = None
            yield model, swarm

    return open_it


class InProcessTemplates:
    """Renders in the test's process; the separate process of a daemon has its own tests. `rendered`: how often."""

    def __init__(self):
        self.uses_tools = {}
        self.rendered = 0

    async def render(self, template, messages, variables, *, opens_answer=True, continues_last=False):
        from transformers.utils.chat_template_utils import render_jinja_template

        self.rendered += 1
        rendered, _ = render_jinja_template(
            [messages],
            chat_template=template,
            add_generation_prompt=opens_answer,
            continue_final_message=continues_last,
            **variables,
        )
        return rendered[0]


class NoStatus:
    """Status has its own tests, with real peers."""


@dataclass
class Answer:
    """The response that came over ASGI."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def events(self):
        """The server-sent events, decoded except for the last."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Caller:
    """Speaks ASGI with the application, and hangs up when an event is set."""

    def __init__(self, app):
        self._app = app

    async def post(self, path, value, *, hang_up=None, answer=None, headers=()):
        hang_up = trio.Event() if hang_up is None else hang_up
        body = json.dumps(value).encode()
        return await self.post_bytes(path, body, hang_up=hang_up, answer=answer, headers=headers)

    async def post_bytes(self, path, body, *, is_whole=True, hang_up=None, answer=None, headers=()):
        answer = answer or Answer()
        if hang_up is None:
            hang_up = trio.Event()
            hang_up.set()
        request = [{"type": "http.request", "body": body, "more_body": not is_whole}]

        async def receive():
            if request:
                return request.pop()
            await hang_up.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                answer.body += message["body"]
            await trio.lowlevel.checkpoint()

        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "scheme": "http"}
        scope |= {"headers": list(headers)}
        await self._app(scope | {"server": ("localhost", 80), "root_path": ""}, receive, send)
        return answer

    async def get(self, path):
        return await self.request("GET", path)

    async def request(self, method, path):
        answer = Answer()

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                answer.body += message["body"]

        scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", "scheme": "http"}
        await self._app(scope | {"server": ("localhost", 80), "root_path": ""}, receive, send)
        return answer


@pytest.fixture
def open_api(open_byte_model):
    """`async with open_api(head) as (caller, swarm):` the application over one model called `bytes`."""

    @asynccontextmanager
    async def open_it(head=None, answering=None, generation_config=None, kept_positions=0, **how):
        async with open_byte_model(head, generation_config, **how) as (model, swarm):
            if kept_positions:
                model.keep_sessions(kept_positions)
            answering = answering or Answering()
            api = Api(Models({"bytes": model}), InProcessTemplates(), NoStatus(), NoStatus(), History(), answering)
            yield Caller(api.app()), swarm

    return open_it


@pytest.fixture
def scripted_head():
    """`scripted_head(text)`: a head that makes the model say `text`."""
    return ScriptedHead


@asynccontextmanager
async def open_daemon_of(model, swarm, folder):
    """An API over a model, on a unix socket and on a port."""
    client = SimpleNamespace(
        peer_id="12D3KooWClientClientClient",
        addresses=(),
        served=(),
        server=None,
        connections=SimpleNamespace(live={}, containment=Containment(), swarm=None, meters=Meters()),
        discovery=SimpleNamespace(
            directory=_Directory(swarm),
            contacts=lambda: _contacts(swarm),
            track_record=TrackRecord(trio.current_time),
        ),
        reachability=SimpleNamespace(
            reach=Reach.PRIVATE, here=ReachReport(Reach.PRIVATE, (ip_address("6.6.6.6"),), "nobody can dial us")
        ),
        relay=Relay(PeerId("us"), RelayLimits(slots=5, circuits=7)),
        reservations=SimpleNamespace(held={RELAY: Reservation(RELAY, (Multiaddr("ip4", "6.6.6.7", 1),), TERMS)}),
    )
    endpoint = Endpoint(folder / "p.sock", "127.0.0.1", 0, TOKEN)
    async with open_local_api(client, {"bytes": model}, endpoint) as api:
        yield SimpleNamespace(swarm=swarm, model=model, client=client, socket=folder / "p.sock", url=api.urls[1])


@pytest.fixture
def open_daemon(open_byte_model, tmp_path):
    """`async with open_daemon() as daemon:` an API over the model that counts."""

    @asynccontextmanager
    async def open_it(head=None, **serving):
        opening = open_byte_model(head, **serving)
        async with opening as (model, swarm), open_daemon_of(model, swarm, tmp_path) as daemon:
            yield daemon

    return open_it


class _Directory:
    def __init__(self, swarm):
        self._swarm = swarm

    async def servers(self, model, block_count, *, max_age_s=0.0):
        await trio.lowlevel.checkpoint()
        return [host.offer() for host in self._swarm.hosts if host.online]


def _contacts(swarm):
    return [Contact(host.peer_id, host.connections.listen_addresses) for host in swarm.hosts if host.online]


@pytest.fixture
def open_daemon_of_model(tmp_path):
    """`async with open_daemon_of_model(model, swarm) as daemon:` an API over a model of the test's own."""
    return lambda model, swarm: open_daemon_of(model, swarm, tmp_path)
