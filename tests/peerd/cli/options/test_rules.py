"""Which options of a daemon need or exclude each other, rule by rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from peerd.cli.options.rules import RULES, ApiOptions, DaemonOptions, ServingOptions, broken_rule
from peerd.cli.options.shared import JoinOptions
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import Identity
from peerd.protocol.span import Span
from peerd.reach.relay_ledger import RelayLimits

JOINING = JoinOptions((), None, None)
HERE = (Multiaddr.parse("/ip4/127.0.0.1/tcp/31330/ws"),)
ONE, TWO = (None, "org/one"), (None, "org/two")
CLIENT = ApiOptions(client=True)
SOMEBODY = Identity.from_seed(bytes(32)).peer_id
HTTP = ("127.0.0.1", 8080)

# In the order of RULES, each with how its message begins: the options break it and no rule before it.
BROKEN = [
    ({"among": ("org/*",), "serve_blocks": Span(0, 4)}, "--models lets"),
    ({"among": ("org/*",), "serve_blocks": "auto", "models": (ONE,)}, "--models lets"),
    ({"among": ("org/*",), "api": CLIENT}, "--models lets"),
    ({"serve_blocks": 4}, "--serve-blocks says"),
    ({"serve_blocks": 4, "models": (ONE, TWO)}, "--serve-blocks says"),
    ({"among": ("org/*",), "serve_blocks": "auto", "revision": "main"}, "--revision is for --model: "),
    ({"api": CLIENT, "revision": "main"}, "--revision and --disk"),
    ({"api": CLIENT, "disk_bytes": 1}, "--revision and --disk"),
    ({"api": CLIENT, "models": (ONE, TWO), "revision": "main"}, "--revision is for one"),
    ({"models": (ONE,), "listen": HERE}, "--model is for"),
    ({"api": CLIENT, "serving": ServingOptions(stay=True)}, "--dtype"),
    ({"listen": HERE, "serving": ServingOptions(client_adapter_bytes=0)}, "--dtype"),
    ({"api": CLIENT, "serving": ServingOptions(idle_only=True)}, "--dtype"),
    ({"api": CLIENT, "serving": ServingOptions(nice=5)}, "--dtype"),
    ({"serve_blocks": 4, "models": (ONE,), "serving": ServingOptions(gpu_share=0.5)}, "--gpu-share is"),
    ({"serve_blocks": "auto", "models": (ONE,), "serving": ServingOptions(trainable=(SOMEBODY,))}, "--trainable is"),
    ({"serve_blocks": "auto", "models": (ONE,), "serving": ServingOptions(trainable_rate=0.1)}, "--trainable-rate"),
    ({"serve_blocks": "auto", "models": (ONE,), "serving": ServingOptions(trainable_steps=9)}, "--trainable-rate"),
    ({}, "nothing to do"),
    ({"announce": HERE}, "nothing to do"),
    ({"listen": HERE, "audit": 0.5}, "--audit and"),
    ({"listen": HERE, "audit_limits": Path("t")}, "--audit and"),
    ({"api": ApiOptions(client=True, no_token=True)}, "--token-file"),
    ({"api": ApiOptions(client=True, token_file=Path("t"))}, "--token-file"),
    ({"api": ApiOptions(http=("0.0.0.0", 8080), no_token=True)}, "--no-token"),
    ({"api": CLIENT, "announce": HERE}, "--announce"),
    ({"api": CLIENT, "relay": RelayLimits()}, "--relay"),
    ({"api": CLIENT, "models": (("a", "org/one"), ("a", "org/two"))}, "two of --model"),
    ({"api": ApiOptions(client=True, drafts=(ONE,))}, "--draft guesses"),
    ({"serve_blocks": 4, "models": (ONE,), "api": ApiOptions(drafts=(TWO,))}, "--draft guesses"),
    ({"listen": HERE, "api": ApiOptions(traces=True)}, "--traces"),
    ({"api": ApiOptions(client=True, remote_head=True)}, "--remote-head"),
    ({"api": CLIENT, "serving": ServingOptions(serve_head=True)}, "--dtype"),
    ({"api": ApiOptions(client=True, draft_device="cuda"), "models": (ONE,)}, "--draft-device is"),
    ({"api": ApiOptions(client=True, drafts=(ONE,)), "models": (ONE, TWO)}, "--draft must"),
    ({"api": ApiOptions(client=True, drafts=(ONE, TWO)), "models": (ONE,)}, "two of --draft"),
]
WHOLE = [
    {"api": ApiOptions(client=True, drafts=(("a", "org/s"), ("b", "org/s")), draft_device="cpu"), "models": (ONE, TWO)},
    {"api": ApiOptions(client=True, drafts=(ONE,)), "models": (TWO,)},
    {"listen": HERE},
    {"listen": HERE, "announce": HERE, "relay": RelayLimits(), "stop_on_eof": True},
    {"api": CLIENT},
    {"api": CLIENT, "audit": 0.0, "audit_limits": Path("t")},
    {"api": ApiOptions(socket_path=Path("s"))},
    {"api": ApiOptions(http=HTTP, no_token=True)},
    {"api": ApiOptions(http=("0.0.0.0", 8080), token_file=Path("t"))},
    {"api": CLIENT, "models": (ONE, TWO, ("a", "org/one"), ("b", "org/one")), "disk_bytes": 1},
    {"serve_blocks": Span(0, 4), "models": (ONE,), "announce": HERE, "relay": RelayLimits()},
    {"serve_blocks": "auto", "models": (ONE,), "revision": "main", "serving": ServingOptions(stay=True)},
    {
        "serve_blocks": Span(0, 4),
        "models": (ONE,),
        "serving": ServingOptions(trainable=(SOMEBODY,), trainable_rate=0.1),
    },
    {"serve_blocks": 4, "models": (ONE,), "serving": ServingOptions(gpu_share=0.5, devices=("cuda:0",))},
    {"serve_blocks": 4, "among": ("org/*",), "disk_bytes": 1, "serving": ServingOptions(devices=("cpu",))},
]


@pytest.mark.parametrize(("options", "begins"), BROKEN)
def test_options_that_do_not_fit_break_their_rule(options: dict[str, object], begins: str) -> None:
    message = broken_rule(DaemonOptions(joining=JOINING, **options))  # type: ignore[arg-type]
    assert message is not None
    assert message.startswith(begins)


@pytest.mark.parametrize("options", WHOLE)
def test_options_that_fit_break_no_rule(options: dict[str, object]) -> None:
    assert broken_rule(DaemonOptions(joining=JOINING, **options)) is None  # type: ignore[arg-type]


def test_every_rule_can_be_broken_and_says_what_to_write() -> None:
    messages = [message for _, message in RULES]
    assert all(any(message.startswith(begins) for _, begins in BROKEN) for message in messages)
    assert all("--" in message for message in messages)
