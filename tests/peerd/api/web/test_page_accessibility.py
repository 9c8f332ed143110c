"""The page by axe-core's rules (WCAG 2.2 to level AA, and best practice), in light and dark, wide and narrow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from tests.fakes.api_fixture import TOKEN
from tests.fakes.browser import CHROMIUM, Page, open_page, run_chromium

AXE = Path(__file__).parents[4] / ".cache/node_modules/axe-core/axe.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
ANSWER = "Yes:\n\n1. **One**\n\n|a|b|\n|-|-|\n|1|`2`|\n\n```py\nf()\n```\n\n> quoted\n\n[b](https://example.org/)"
RUN = f"""axe.run(document, {{runOnly: {json.dumps(RULES)}}}).then((found) => [
    found.passes.length,
    found.violations.map((one) => [one.id, one.help, one.nodes.map((node) => node.target.join(" "))]),
])"""
pytestmark = [
    pytest.mark.real_time,
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not here: npm install --prefix .cache axe-core"),
]


async def violations(page: Page) -> list[object]:
    passed, violated = await page.run(RUN)
    assert passed > 10, "axe has looked at nothing"
    return list(violated)


async def violations_in_all_looks(page: Page) -> list[object]:
    found: list[object] = []
    for width in (1280, 390):
        for dark in (False, True):
            await page.look(width, 900, dark=dark)
            found += [(width, dark, one) for one in await violations(page)]
    return found


async def test_every_view_follows_the_rules(open_daemon, scripted_head, tmp_path: Path) -> None:
    axe = await trio.Path(AXE).read_text()
    with run_chromium(tmp_path) as browser:
        async with open_daemon(scripted_head(ANSWER)) as daemon, open_page(browser) as page:
            await page.go(f"{daemon.url}/#token={TOKEN}")
            await page.run(f"{axe}; 0")
            await page.wait("document.querySelector('#health').textContent === 'ready'")
            assert await violations_in_all_looks(page) == []
            await page.run("document.querySelector('#prompt').focus()")
            await page.type("What is two?")
            await page.press("Enter")
            await page.wait("document.querySelector('.message.assistant:last-child .tools button')")
            assert await violations_in_all_looks(page) == []
            await page.run("document.querySelector('[aria-controls=settings]').click()")
            assert await violations_in_all_looks(page) == []
            await page.run("location.hash = 'swarm'")
            await page.wait("document.querySelector('.qr figcaption') && !document.querySelector('#view-swarm').hidden")
            assert await violations_in_all_looks(page) == []
            await page.run("location.hash = 'peer'")
            await page.wait("document.querySelector('#uptime') && !document.querySelector('#view-peer').hidden")
            assert await violations_in_all_looks(page) == []
            daemon.swarm.kill(daemon.swarm.hosts[1])
            await page.run("location.hash = 'swarm'")
            await page.wait("document.querySelector('.verdict.bad')")
            assert await violations_in_all_looks(page) == []
            assert page.errors == []
