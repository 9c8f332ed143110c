"""What tests of several HTTP APIs share: OpenAI's own client, and a model that calls a tool."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import httpx2
import openai

TOKEN = "t" * 32
# A chat template that shows whether it was given tools, and past calls by their city.
TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.arguments.city }}){% endfor %}{% endfor %}"
    "{{ '/no_think' if enable_thinking is false }}{{ '<assistant>' if add_generation_prompt }}"
)
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


class Daemon(Protocol):
    """A local API that listens on a Unix socket and on a port."""

    @property
    def socket(self) -> Path: ...

    @property
    def url(self) -> str: ...


def openai_client(daemon: Daemon, over: str = "unix", token: str = TOKEN) -> openai.OpenAI:
    """A client that speaks to the daemon's socket, or to its address if `over` is "tcp"."""
    if over == "tcp":
        return openai.OpenAI(base_url=f"{daemon.url}/v1", api_key=token, max_retries=0)
    http = httpx2.Client(transport=httpx2.HTTPTransport(uds=str(daemon.socket)))
    return openai.OpenAI(base_url="http://localhost/v1", api_key="unused", http_client=http, max_retries=0)
