"""The page in a real Chromium, as people use it: type, read, stop, retry, edit, and a server that dies meanwhile."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from peerd.protocol.invitation import Invitation
from tests.fakes.api_fixture import TOKEN
from tests.fakes.browser import CHROMIUM, open_page, run_chromium
from tests.peerd.api.conftest import ScriptedHead

pytestmark = [pytest.mark.real_time, pytest.mark.processes]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

ANSWER = """Yes:

1. **One**
2. *Two*

|a|b|
|-|-|
|1|`2`|

```py
f("<b>")
```

<img src=x> [a](javascript:x) [b](https://example.org/)"""
LONG = "word " * 180
LAST = "document.querySelector('.message.assistant:last-child')"
ADD_ODD = """[...JSON.parse(localStorage['peerd.conversations']), {id: "old", messages: [
    null, {role: "user"}, {role: "user", content: "Old"}, {role: "assistant", content: "Old answer", figures: {}}]}]"""
DONE = f"{LAST} && {LAST}.querySelector('.tools button')"


def press(kind, label):
    """A script that presses the button with this label at the last message of a kind."""
    buttons = f"[...document.querySelectorAll('.message.{kind} button')]"
    return f"{buttons}.findLast((button) => button.textContent === '{label}').click()"


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    with run_chromium(tmp_path_factory.mktemp("chromium")) as url:
        yield url


@pytest.fixture
def open_chat(open_daemon, chromium):
    """`async with open_chat(text) as (page, daemon):` the page of a daemon whose model says `text`."""

    @asynccontextmanager
    async def open_it(text, **how):
        async with open_daemon(ScriptedHead(text), **how) as daemon, open_page(chromium) as page:
            await page.go(f"{daemon.url}/#token={TOKEN}")
            await page.wait("document.querySelector('#health').textContent === 'ready'")
            yield page, daemon

    return open_it


async def ask(page, text):
    await page.run("document.querySelector('#prompt').focus()")
    await page.type(text)
    await page.press("Enter")
    await page.wait(LAST)


@needs_browser
async def test_an_answer_is_shown_as_what_its_markdown_means_and_never_as_html(open_chat):
    async with open_chat(ANSWER) as (page, _):
        await ask(page, "Hi")
        await page.wait(DONE)
        shown = f"{LAST}.querySelector('.text')"
        assert await page.run(f"{shown}.querySelector('ol li strong').textContent") == "One"
        assert await page.run(f"{shown}.querySelector('li em').textContent") == "Two"
        assert await page.run(f"{shown}.querySelector('td code').textContent") == "2"
        assert await page.run(f"{shown}.querySelector('pre').textContent") == 'f("<b>")'
        assert await page.run(f"{shown}.querySelectorAll('img, b').length") == 0
        assert await page.run(f"[...{shown}.querySelectorAll('a')].map((one) => one.href)") == ["https://example.org/"]
        assert await page.run("document.title") == "peerd"
        assert "tokens/s" in await page.run("document.querySelector('.strip').innerText")
        assert "token" not in await page.run("location.href")
        assert page.errors == []


@needs_browser
async def test_what_the_model_thinks_is_folded_away_beside_its_answer(open_chat):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{# <think> #}"
    async with open_chat("<think>2 and <b>2</b>.</think>It is 4.", chat_template=template) as (page, _):
        await ask(page, "2+2?")
        await page.wait(DONE)
        thought = f"{LAST}.querySelector('.thought')"
        assert await page.run(f"[{thought}.hidden, {thought}.open]") == [False, False]
        assert await page.run(f"{thought}.lastElementChild.textContent") == "2 and <b>2</b>."
        assert await page.run(f"{LAST}.querySelector('.text').textContent") == "It is 4."
        await ask(page, "Again")
        await page.wait(DONE)
        assert page.errors == []


@needs_browser
async def test_a_conversation_outlives_a_reload_and_can_be_edited(open_chat):
    async with open_chat("Certainly.") as (page, daemon):
        await ask(page, "First question")
        await page.wait(DONE)
        # Another version of the page may have kept less, or more, of one.
        await page.run(f"localStorage['peerd.conversations'] = JSON.stringify({ADD_ODD})")
        await page.go("about:blank")
        await page.go(f"{daemon.url}/")
        await page.wait(f"{LAST}?.innerText.includes('Certainly.')")
        await page.run("document.querySelectorAll('.conversations .title')[1].click()")
        await page.wait(f"{LAST}?.innerText.includes('Old answer')")
        await page.run("document.querySelector('.conversations .title').click()")
        await page.run(press("user", "Edit"))
        await page.run("document.querySelector('.edit textarea').value = 'Another question'")
        await page.run("document.querySelector('.edit button').click()")
        await page.wait(f"document.querySelector('.message.user').innerText.includes('Another') && {DONE}")
        assert await page.run("document.querySelectorAll('.message').length") == 2
        assert await page.run("document.querySelector('.conversations .title').textContent") == "Another question"
        assert page.errors == []


@needs_browser
async def test_the_next_turn_says_how_much_of_it_was_read_before(open_chat):
    async with open_chat("Certainly.") as (page, daemon):
        daemon.model.keep_sessions(8192)
        await ask(page, "A question that is long enough to be kept")
        await page.wait(DONE)
        figures = "document.querySelector('.strip').innerText"
        assert "read before" not in await page.run(figures)
        await ask(page, "And then?")
        await page.wait(f"{figures}.match(/[0-9]+ of [0-9]+ tokens read before/)")
        assert page.errors == []


@needs_browser
async def test_a_question_may_be_chosen_and_what_is_refused_is_said_in_a_sentence(open_chat):
    async with open_chat("Certainly.") as (page, _):
        await page.wait("document.querySelector('.welcome h2').textContent === 'Ask bytes'")
        await page.run("document.querySelector('[aria-controls=settings]').click()")
        await page.run("document.querySelector('#settings input').value = 9")
        await page.run("document.querySelector('#settings input').dispatchEvent(new Event('change'))")
        await page.run("document.querySelector('.examples button').click()")
        await page.wait("document.querySelector('.failure')")
        said = await page.run("document.querySelector('.failure p').textContent")
        assert said.startswith("Temperature")
        assert said.endswith(".")
        assert "0 tokens" not in await page.run("document.querySelector('.strip').innerText")


@needs_browser
async def test_stop_ends_the_answer_and_frees_its_session(open_chat):
    async with open_chat(LONG) as (page, daemon):
        await ask(page, "Talk")
        await page.wait(f"{LAST}.innerText.includes('word word')")
        await page.press("Escape")
        await page.wait(f"{LAST}.innerText.includes('Stopped.') && {DONE}")
        with trio.fail_after(10):
            while any(host.server.sessions for host in daemon.swarm.hosts):
                await trio.sleep(0.02)
        await page.run(press("assistant", "Retry"))
        await page.wait(f"{LAST}.innerText.includes('word')")
        assert page.errors == []


@needs_browser
async def test_the_chain_changes_under_ones_eyes_when_a_server_dies(open_chat):
    async with open_chat(LONG) as (page, daemon):
        spare = await daemon.swarm.serve(3, 6)
        await ask(page, "Talk")
        chain = "[...document.querySelectorAll('.hop:not(.end)')].map((hop) => hop.title)"
        await page.wait(f"{chain}.length === 3")
        before = await page.run(chain)
        dead = next(host for host in daemon.swarm.hosts if str(host.peer_id) == before[1])
        daemon.swarm.kill(dead)
        await page.wait(f"{chain}[1] !== {json.dumps(before[1])}")
        await page.wait("document.querySelector('.strip').innerText.includes('replaced on the way')")
        assert await page.run(f"{chain}.length") == 3
        assert spare.online or dead is spare
        assert page.errors == []


@needs_browser
async def test_the_swarm_is_said_in_words_and_so_is_what_is_missing(open_chat):
    async with open_chat("Hi") as (page, daemon):
        await page.run("location.hash = 'swarm'")
        await page.wait("document.querySelector('.verdict.thin')?.textContent.includes('0:9')")
        assert await page.run("document.querySelectorAll('#view-swarm tbody tr').length") == 3
        assert "--serve-blocks auto" in await page.run("document.querySelector('#join-0').textContent")
        link = await page.run("document.querySelector('#invite-0').textContent")
        assert Invitation.parse(link.removeprefix("peerd join ")).model == "bytes"
        await page.wait("document.querySelector('.qr figcaption')?.textContent.startsWith('Works')")
        daemon.swarm.kill(daemon.swarm.hosts[1])
        await page.wait("document.querySelector('.verdict.bad')?.textContent.includes('3:6')")
        await page.wait("document.querySelector('#health').textContent.includes('waiting')")
        await page.run("location.hash = 'chat'")
        await page.run("location.hash = 'peer'")
        await page.wait("document.querySelector('#view-peer').innerText.includes('12D3KooWClientClientClient')")
        assert page.errors == []


@needs_browser
async def test_without_the_token_the_page_asks_for_it(open_daemon, chromium):
    async with open_daemon() as daemon, open_page(chromium) as page:
        await page.go(f"{daemon.url}/")
        await page.wait("document.querySelector('#login').open")
        await page.run("document.querySelector('#token').focus()")
        await page.type(TOKEN)
        await page.press("Enter")
        await page.wait("document.querySelector('#health').textContent === 'ready'")


async def test_the_page_s_files_need_no_token_and_everything_else_does(open_daemon):
    async with open_daemon() as daemon:

        def get(path):
            return httpx.get(f"{daemon.url}{path}")

        page = await trio.to_thread.run_sync(get, "/")
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        script = await trio.to_thread.run_sync(get, "/web/main.js")
        assert script.headers["content-type"].startswith("text/javascript")
        for path in ("/peerd/v1/swarm", "/peerd/v1/status", "/v1/models", "/web/../peerd/v1/swarm"):
            assert (await trio.to_thread.run_sync(get, path)).status_code == 401
        for path in ("/web/none.js", "/web/..%2Ffiles.py", "/web/__init__.py"):
            assert (await trio.to_thread.run_sync(get, path)).status_code == 404
