"""Which requests get KV tokens, in which order, and the effect of those that give up."""

import pytest
import trio
import trio.testing

from peerd.net.limits.owners import Owner
from peerd.protocol.errors import NoRoom
from peerd.protocol.identity import PeerId
from peerd.server.admission import (
    HOLD_UP_S,
    MAX_RETRY_S,
    MAX_WAIT_S,
    MAX_WAITING,
    MAX_WAITING_A_NETWORK,
    MAX_WAITING_A_PEER,
    Admission,
)


def owner_of(name: str) -> Owner:
    """`key@network`, or a key on loopback."""
    key, _, network = name.partition("@")
    return Owner(PeerId(key), network)


class Pool:
    """Counts tokens as the engine does."""

    def __init__(self, total: int) -> None:
        self.total = self.free = total
        self.admission = Admission(total, lambda: self.free)
        self.order: list[str] = []

    async def take(self, owner: str, tokens: int, timeout_s: float = 100) -> None:
        def attempt() -> None:
            if tokens > self.free:
                raise NoRoom("full", self.free)
            self.free -= tokens
            self.order.append(owner)

        def undo() -> None:
            self.free += tokens

        await self.admission.admit(owner_of(owner), tokens, attempt, timeout_s, undo)

    def give(self, owner: str, tokens: int) -> None:
        self.free += tokens
        self.admission.release(owner_of(owner), tokens)


async def test_a_full_pool_says_how_much_is_free_once_the_timeout_is_over():
    pool = Pool(100)
    await pool.take("a", 70)
    before = trio.current_time()
    with pytest.raises(NoRoom) as caught:
        await pool.take("b", 50, timeout_s=2)
    assert caught.value.free_tokens == 30
    assert trio.current_time() - before == pytest.approx(2)


async def test_a_timeout_of_zero_answers_at_once():
    pool = Pool(100)
    await pool.take("a", 100, timeout_s=0)
    before = trio.current_time()
    with pytest.raises(NoRoom):
        await pool.take("b", 1, timeout_s=0)
    assert trio.current_time() == before


async def test_waiters_are_served_in_order_and_nobody_overtakes_a_big_request():
    pool = Pool(100)
    await pool.take("a", 80)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.take, "big", 90)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(pool.take, "small", 10)
        await trio.testing.wait_all_tasks_blocked()
        assert pool.order == ["a"]
        pool.give("a", 80)
    assert pool.order == ["a", "big", "small"]


async def test_a_request_that_gives_up_lets_the_next_one_in():
    pool = Pool(100)
    await pool.take("a", 80)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(pool.take, "small", 20)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await pool.take("big", 90)
    assert pool.order == ["a", "small"]
    assert pool.free == 0


async def test_a_cancelled_waiter_leaves_no_trace():
    pool = Pool(100)
    await pool.take("a", 80)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.take, "b", 90)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    pool.give("a", 80)
    assert pool.free == 100
    await pool.take("c", 100, timeout_s=0)


async def test_while_others_wait_one_owner_holds_at_most_half():
    pool = Pool(100)
    await pool.take("hog", 40)
    await pool.take("other", 50)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.take, "hog", 20)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(pool.take, "modest", 30)
        await trio.testing.wait_all_tasks_blocked()
        pool.give("other", 50)
        await trio.testing.wait_all_tasks_blocked()
        # The big client came first, but would hold 60 of 100 while another waits. None waits once the modest one is in.
        assert pool.order == ["hog", "other", "modest", "hog"]


async def test_a_lone_owner_may_hold_everything():
    pool = Pool(100)
    await pool.take("only", 60)
    await pool.take("only", 40, timeout_s=0)
    assert pool.free == 0


async def test_a_grant_to_a_request_that_was_cancelled_meanwhile_comes_back():
    pool = Pool(100)
    await pool.take("a", 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.take, "b", 60)
        nursery.start_soon(pool.take, "c", 70)
        await trio.testing.wait_all_tasks_blocked()
        # Without a pause in between: the cancelled cannot have left the queue when the tokens come.
        nursery.cancel_scope.cancel()
        pool.give("a", 100)
    assert pool.free == 100
    # No owner counts for more than it holds.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.take, "b", 100)
        await trio.testing.wait_all_tasks_blocked()
    assert pool.free == 0


async def test_a_pool_is_full_once_a_request_has_waited_and_until_a_share_of_it_is_free():
    pool = Pool(100)
    said: list[bool] = []
    pool.admission.on_change.append(lambda: said.append(pool.admission.is_full))
    for _ in range(10):
        await pool.take("a", 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.take, "b", 10)
        await trio.sleep(HOLD_UP_S / 2)
        # A moment's wait is no news.
        assert said == []
        await trio.sleep(HOLD_UP_S)
        assert said == [True]
        pool.give("a", 10)
    # No request waits any more, but there is no room for a newcomer either.
    assert said == [True]
    pool.give("a", 10)
    assert said == [True]
    pool.give("a", 10)
    assert said == [True, False]


async def test_a_refusal_says_when_to_come_again_by_the_pace_at_which_sessions_end():
    pool = Pool(100)
    await pool.take("a", 100)
    with pytest.raises(NoRoom) as caught:
        await pool.take("b", 10, timeout_s=0)
    # None has ended yet: nothing is known.
    assert caught.value.retry_after_s == 0
    for _ in range(8):
        await trio.sleep(3)
        pool.give("a", 10)
    await pool.take("a", 80)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(pool.take, "c", 10)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(NoRoom) as caught:
            await pool.take("b", 10, timeout_s=0)
        # Four wait, and it would be the sixth whose turn comes.
        assert 4 * 3 <= caught.value.retry_after_s <= 6 * 3
        nursery.cancel_scope.cancel()


async def test_a_hint_is_never_longer_than_a_minute():
    pool = Pool(100)
    await pool.take("a", 100)
    for _ in range(2):
        await trio.sleep(10_000)
        pool.give("a", 1)
    with pytest.raises(NoRoom) as caught:
        await pool.take("b", 10, timeout_s=0)
    assert caught.value.retry_after_s == MAX_RETRY_S


async def test_a_request_is_refused_at_once_when_too_many_wait():
    pool = Pool(100)
    await pool.take("a", 100)
    async with trio.open_nursery() as nursery:
        for number in range(MAX_WAITING):
            nursery.start_soon(pool.take, str(number), 10, 1000)
        await trio.testing.wait_all_tasks_blocked()
        before = trio.current_time()
        with pytest.raises(NoRoom, match="wait here already"):
            await pool.take("late", 10, timeout_s=1000)
        assert trio.current_time() == before
        nursery.cancel_scope.cancel()


async def test_while_others_wait_one_network_holds_at_most_half():
    pool = Pool(100)
    await pool.take("one@net", 40)
    await pool.take("other", 50)
    async with trio.open_nursery() as nursery:
        # Another key of the same network.
        nursery.start_soon(pool.take, "two@net", 20)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(pool.take, "modest", 30)
        await trio.testing.wait_all_tasks_blocked()
        pool.give("other", 50)
        await trio.testing.wait_all_tasks_blocked()
        assert pool.order == ["one@net", "other", "modest", "two@net"]


@pytest.mark.parametrize(
    ("names", "places"),
    [(["key"] * 300, MAX_WAITING_A_PEER), ([f"{n}@net" for n in range(300)], MAX_WAITING_A_NETWORK)],
    ids=["a key", "a network"],
)
async def test_the_queue_has_few_places_for_one_owner_and_one_for_every_other(names, places):
    pool = Pool(100)
    await pool.take("holder", 100)
    refused = []

    async def wait(name):
        try:
            await pool.take(name, 100)
        except NoRoom:
            refused.append(name)

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(wait, name)
        await trio.testing.wait_all_tasks_blocked()
        assert len(refused) == len(names) - places
        nursery.start_soon(wait, "honest")
        await trio.testing.wait_all_tasks_blocked()
        assert "honest" not in refused
        nursery.cancel_scope.cancel()


async def test_a_queue_that_few_keys_fill_makes_room_for_a_newcomer():
    pool = Pool(100)
    await pool.take("holder", 100)
    refused = []

    async def wait(name):
        try:
            await pool.take(name, 100)
        except NoRoom:
            refused.append(name)

    async with trio.open_nursery() as nursery:
        for number in range(MAX_WAITING):
            nursery.start_soon(wait, f"squatter {number // MAX_WAITING_A_PEER}")
        await trio.testing.wait_all_tasks_blocked()
        assert refused == []
        nursery.start_soon(wait, "honest")
        await trio.testing.wait_all_tasks_blocked()
        assert len(refused) == 1
        assert refused[0].startswith("squatter")
        nursery.cancel_scope.cancel()


async def test_nobody_keeps_a_place_in_the_queue_for_longer_than_a_client_would_wait():
    pool = Pool(100)
    await pool.take("holder", 100)
    with pytest.raises(NoRoom):
        await pool.take("squatter", 100, timeout_s=600)
    assert trio.current_time() == pytest.approx(MAX_WAIT_S)
