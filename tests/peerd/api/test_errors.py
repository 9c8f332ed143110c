"""The HTTP errors that programs get for the swarm's errors."""

from __future__ import annotations

import pytest

from peerd.api.errors import api_error
from peerd.protocol.errors import NoRoom, Overloaded


@pytest.mark.parametrize(("hint_s", "said"), [(0.0, "2"), (7.2, "8"), (60.0, "60")])
def test_overload_is_a_429_that_says_when_the_servers_expect_room(hint_s: float, said: str) -> None:
    for error in (NoRoom("full", 0, hint_s), Overloaded("full", hint_s)):
        answer = api_error(error)
        assert answer.status == 429
        assert answer.headers == {"Retry-After": said}
