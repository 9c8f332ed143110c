"""The link that `peerd --open` prints."""

from __future__ import annotations

import webbrowser

import pytest

from peerd.cli.page_link import page_link, show_page


@pytest.mark.parametrize(
    ("url", "token", "link"),
    [
        ("http://127.0.0.1:80", "abc", "http://127.0.0.1:80/#token=abc"),
        ("http://127.0.0.1:80", "a#b/c", "http://127.0.0.1:80/#token=a%23b%2Fc"),
        ("http://127.0.0.1:80", None, "http://127.0.0.1:80/"),
        ("http://0.0.0.0:80", None, "http://127.0.0.1:80/"),
        ("http://[::]:80", None, "http://[::1]:80/"),
    ],
)
def test_the_link_leads_to_this_machine_and_carries_the_token_in_its_fragment(url, token, link) -> None:
    assert page_link(url, token) == link


@pytest.mark.parametrize("environ", [{"DISPLAY": ":0"}, {"WAYLAND_DISPLAY": "wayland-0"}])
async def test_a_desktop_opens_the_link(environ, capsys) -> None:
    opened: list[str] = []
    await show_page("http://x/", environ=environ, open_browser=opened.append)
    assert opened == ["http://x/"]
    assert capsys.readouterr().err == "open http://x/\n"


async def test_without_a_desktop_the_link_is_only_printed(capsys) -> None:
    await show_page("http://x/", environ={}, open_browser=lambda _: pytest.fail("no desktop"))
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "open http://x/\n")


async def test_a_browser_that_does_not_start_costs_nothing(capsys) -> None:
    def fail(_: str) -> None:
        raise webbrowser.Error("no browser")

    await show_page("http://x/", environ={"DISPLAY": ":0"}, open_browser=fail)
    assert "http://x/" in capsys.readouterr().err
