"""Sessions over a swarm give the same results as one local model, whichever peers die meanwhile."""

from dataclasses import replace
from random import Random

import pytest
import torch
import trio

from peerd.client.finding.finder import Patience
from peerd.client.session.troubles import HopLost
from peerd.compute.kv.layout import Keep
from peerd.protocol.errors import (
    BadResult,
    ConnectionLost,
    ContextTooLong,
    InvalidRequest,
    NoChain,
    NoRoom,
    Overloaded,
)
from peerd.protocol.messages.session import Failure
from peerd.protocol.rows import PREFILL_POSITIONS, Drop, Fork, RowSlice
from peerd.protocol.span import Span
from peerd.testing.fake_engine import FakeEngine, fake_forward

WIDTH = 8
BLOCKS = Span(0, 9)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 251, (count, WIDTH), generator=generator).float()


async def chain_of_three(swarm):
    return [await swarm.serve(0, 3), await swarm.serve(3, 6), await swarm.serve(6, 9)]


async def test_steps_through_three_servers_equal_the_whole_model(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS)
        row = tokens(20)
        expected = whole_forward(row, 9)
        assert torch.equal(await session.step(row[:7]), expected[6:7])
        assert torch.equal(await session.step(row[7:12], want="all"), expected[7:12])
        for position in range(12, 20):
            assert torch.equal(await session.step(row[position : position + 1]), expected[position : position + 1])
        assert [hop.span.start for hop in session.chain] == [0, 3, 6]


async def test_results_go_from_server_to_server_and_not_through_the_client(open_swarm):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        client = await swarm.client()
        session = await client.session(BLOCKS)
        await session.step(tokens(5))
        assert hosts[1].peer_id in hosts[0].connections.live
        assert hosts[2].peer_id in hosts[1].connections.live
        # 5 ms a hop: client -> 0 -> 1 -> 2 -> client is 20 ms beside 30 ms of computing; hub and spoke 30.
        before = trio.current_time()
        await session.step(tokens(1))
        assert trio.current_time() - before == pytest.approx(0.050, abs=0.002)


async def test_empty_steps_change_nothing(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS)
        row = tokens(6)
        for start in range(0, 6, 2):
            await session.step(row[:0])
            result = await session.step(row[start : start + 2], want="all")
            assert torch.equal(result, whole_forward(row, 9)[start : start + 2])


async def test_a_long_prefill_travels_in_pieces_that_the_servers_work_on_at_once(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        for start in (0, 3, 6):
            await swarm.serve(start, start + 3, step_s=0.1, batch_tokens=128)
        session = await (await swarm.client()).session(BLOCKS)
        row = tokens(512)
        await session.open()
        before = trio.current_time()
        assert torch.equal(await session.step(row, want="all"), whole_forward(row, 9))
        # Four pieces through three servers of 100 ms: 6 turns, where one after the other would take 12.
        assert trio.current_time() - before < 0.75


async def test_rows_are_independent_and_may_have_different_lengths(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS, max_rows=3)
        one, two = tokens(9, 1), tokens(4, 2)
        rows = [RowSlice(0, 0, 9), RowSlice(2, 0, 4)]
        result = await session.step(torch.cat([one, two]), rows=rows)
        assert torch.equal(result, torch.stack([whole_forward(one, 9)[-1], whole_forward(two, 9)[-1]]))


async def test_rolling_back_and_stepping_again_equals_never_having_gone_there(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS)
        row, other = tokens(12), tokens(12, 1)
        await session.step(row)
        mixed = torch.cat([row[:4], other[:3]])
        assert torch.equal(await session.step(other[:3], start=4, want="all"), whole_forward(mixed, 9)[4:])


async def test_forks_and_drops_act_in_the_step_that_brings_them(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS, max_rows=2)
        row, branch = tokens(8), tokens(2, 1)
        await session.step(row)
        result = await session.step(branch, row=1, start=5, ops=[Fork(0, 1, 5)], want="all")
        assert torch.equal(result, whole_forward(torch.cat([row[:5], branch]), 9)[5:])
        await session.step(row[:1], row=0, start=0, ops=[Drop(0)])
        assert session.log.length(0) == 1


async def test_spans_may_be_entered_and_left_anywhere_inside(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        await swarm.serve(0, 6)
        await swarm.serve(4, 9)
        session = await (await swarm.client()).session(Span(0, 9))
        row = tokens(5)
        assert torch.equal(await session.step(row, want="all"), whole_forward(row, 9))


async def test_a_session_may_ask_for_some_blocks_only(open_swarm):
    from peerd.testing.fake_engine import fake_forward

    async with open_swarm() as swarm:
        await chain_of_three(swarm)
        session = await (await swarm.client()).session(Span(2, 5))
        row = tokens(5)
        assert torch.equal(await session.step(row, want="all"), fake_forward(row, Span(2, 5)))


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_when_a_server_dies_the_others_keep_their_kv_and_nothing_is_lost(open_swarm, whole_forward, victim):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        client = await swarm.client()
        session = await client.session(BLOCKS)
        row = tokens(60)
        expected = whole_forward(row, 9)
        await session.step(row[:40])
        twin = await swarm.serve(hosts[victim].span.start, hosts[victim].span.end)
        before = [host.task.engine.positions_computed for host in hosts]
        swarm.kill(hosts[victim])
        for position in range(40, 60):
            assert torch.equal(await session.step(row[position : position + 1]), expected[position : position + 1])
        assert (session.failovers, session.reopened) == (1, 0)
        # 40 answered ones, and the one under way if the hop before the dead one had it already.
        assert 40 <= session.replayed_positions <= 41
        assert twin.task.engine.positions_computed >= 60
        survivors = [index for index in range(3) if index != victim]
        # 20 new positions, and at most the one that was under way again.
        assert all(hosts[i].task.engine.positions_computed - before[i] <= 21 for i in survivors)
        assert client.finder.failures == [hosts[victim].peer_id]


async def test_a_death_in_the_middle_of_a_step_is_not_noticed_by_its_caller(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        await swarm.serve(3, 6)
        session = await (await swarm.client()).session(BLOCKS)
        row = tokens(300)
        async with trio.open_nursery() as nursery:

            async def kill_soon() -> None:
                await trio.sleep(0.035)
                swarm.kill(next(host for host in hosts if any(h.peer == host.peer_id for h in session.chain[1:2])))

            await session.open()
            nursery.start_soon(kill_soon)
            assert torch.equal(await session.step(row, want="all"), whole_forward(row, 9))


@pytest.mark.parametrize("dies_after", [1, 350], ids=["in the prefill", "in the answer"])
async def test_a_death_beside_servers_whose_windows_have_moved_on_loses_nothing(open_swarm, dies_after: int):
    keeps = {block: Keep(window=7) for block in (1, 2, 4, 7)}

    async def serve(start: int, end: int):
        own = {block: keep for block, keep in keeps.items() if start <= block < end}
        return await swarm.serve_engine(FakeEngine(Span(start, end), hidden_size=WIDTH, batch_tokens=32, keeps=own))

    async with open_swarm() as swarm:
        hosts = [await serve(start, start + 3) for start in range(0, 9, 3)]
        await serve(3, 6)
        session = await (await swarm.client()).session(BLOCKS, max_length=400, max_rollback=0)
        row = tokens(380)
        expected = fake_forward(row, BLOCKS, keeps=keeps)
        async with trio.open_nursery() as nursery:

            async def kill() -> None:
                while not any(host.task.engine.positions_computed >= dies_after for host in hosts[2:]):
                    await trio.sleep(0.005)
                swarm.kill(next(host for host in swarm.hosts if session.chain[1].peer == host.peer_id))

            nursery.start_soon(kill)
            assert torch.equal(await session.step(row[:340], want="all"), expected[:340])
            for position in range(340, 380):
                assert torch.equal(await session.step(row[position : position + 1]), expected[position : position + 1])
        assert session.failovers >= 1


async def test_two_deaths_at_once_are_survived(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS)
        row = tokens(30)
        await session.step(row[:20])
        await swarm.serve(0, 3)
        await swarm.serve(3, 6)
        swarm.kill(hosts[0])
        swarm.kill(hosts[1])
        assert torch.equal(await session.step(row[20:], want="all"), whole_forward(row, 9)[20:])


async def test_a_server_that_hangs_is_overtaken_in_seconds(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS)
        row = tokens(30)
        await session.step(row[:20])
        await swarm.serve(3, 6)
        swarm.freeze(hosts[1])
        before = trio.current_time()
        assert torch.equal(await session.step(row[20:], want="all"), whole_forward(row, 9)[20:])
        assert trio.current_time() - before < 30


async def test_forks_survive_a_death(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS, max_rows=2)
        row, branch = tokens(10), tokens(4, 1)
        await session.step(row)
        await session.step(branch[:1], row=1, start=6, ops=[Fork(0, 1, 6)])
        await swarm.serve(3, 6)
        swarm.kill(hosts[1])
        result = await session.step(branch[1:], row=1, want="all")
        assert torch.equal(result, whole_forward(torch.cat([row[:6], branch]), 9)[7:])
        more = tokens(2, 5)
        assert torch.equal(await session.step(more, want="all"), whole_forward(torch.cat([row, more]), 9)[10:])


async def test_without_a_twin_the_error_says_which_blocks_nobody_serves_and_the_session_can_resume(
    open_swarm, whole_forward
):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS, patience=Patience(missing_s=1))
        row = tokens(12)
        await session.step(row[:5])
        swarm.kill(hosts[1])
        with pytest.raises(NoChain, match="3:6") as caught:
            await session.step(row[5:6])
        assert caught.value.missing == ((3, 6),)
        await swarm.serve(3, 6)
        assert torch.equal(await session.step(row[5:], want="all"), whole_forward(row, 9)[5:])


async def test_a_long_step_that_is_given_up_in_the_middle_says_why(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS, max_length=1024, patience=Patience(missing_s=1))
        await session.step(tokens(5))
        swarm.kill(hosts[1])
        # More pieces than may be unanswered.
        row = tokens(6 * PREFILL_POSITIONS)
        with pytest.raises(NoChain, match="3:6"):
            await session.step(row, start=0)
        await swarm.serve(3, 6)
        assert torch.equal(await session.step(row, start=0), whole_forward(row, 9)[-1:])


async def test_a_long_step_is_cut_as_the_hop_wants_it_that_wants_the_shortest_pieces(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        pieces = []
        for start, batch_tokens in ((0, 512), (6, 2048)):
            await swarm.serve(start, start + 6, batch_tokens=batch_tokens)
            session = await (await swarm.client()).session(Span(0, start + 6), max_length=1024)
            await session.open()
            before = session.log.asked
            assert torch.equal(await session.step(tokens(1000)), whole_forward(tokens(1000), start + 6)[-1:])
            pieces.append(session.log.asked - before)
        await swarm.serve(6, 12, batch_tokens=16)
        assert pieces == [4, 4]
        session = await (await swarm.client()).session(Span(6, 12), max_length=1024)
        swarm.kill(swarm.hosts[1])
        await session.open()
        before = session.log.asked
        await session.step(tokens(1000))
        assert session.log.asked - before == 16


async def test_blocks_of_a_dead_server_that_is_still_announced_are_named_as_missing(open_swarm):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS)
        await session.step(tokens(5))
        swarm.kill(hosts[1])
        hosts[1].online = True
        with pytest.raises(NoChain, match="3:6") as caught:
            await session.step(tokens(1))
        assert caught.value.missing == ((3, 6),)


async def test_two_clients_that_want_the_same_scarce_pool_both_finish(open_swarm):
    async with open_swarm() as swarm:
        for start in (0, 3, 6):
            await swarm.serve(start, start + 3, kv_tokens=512)
        done = []

        async def use(client, name: str) -> None:
            session = await client.session(BLOCKS, max_length=400, max_rollback=0)
            for _ in range(10):
                await session.step(tokens(3))
            session.close()
            done.append(name)

        async with trio.open_nursery() as nursery:
            for name in ("a", "b", "c", "d"):
                nursery.start_soon(use, await swarm.client(), name)
        assert sorted(done) == ["a", "b", "c", "d"]
        await trio.sleep(1)
        assert all(host.task.engine.free_tokens == 512 for host in swarm.hosts)


async def test_a_client_that_vanishes_leaves_nothing_behind(open_swarm):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        client = await swarm.client()
        session = await client.session(BLOCKS)
        await session.step(tokens(5))
        assert all(host.task.engine.free_tokens < 4096 for host in hosts)
        swarm.vanish(client)
        await trio.sleep(20)
        assert all(host.task.engine.free_tokens == 4096 for host in hosts)
        assert all(host.server.sessions == 0 for host in hosts)


async def test_closing_a_session_frees_its_kv_at_once(open_swarm):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS)
        await session.step(tokens(5))
        session.close()
        await trio.sleep(0.1)
        assert all(host.task.engine.free_tokens == 4096 for host in hosts)


async def test_a_session_larger_than_any_pool_is_refused_before_work_starts(open_swarm):
    async with open_swarm() as swarm:
        await swarm.serve(0, 9, kv_tokens=256)
        session = await (await swarm.client()).session(BLOCKS, max_length=1024)
        with pytest.raises(ContextTooLong):
            await session.step(tokens(1))


async def test_a_full_swarm_says_so_after_the_callers_patience(open_swarm):
    async with open_swarm() as swarm:
        await swarm.serve(0, 9, kv_tokens=512)
        first = await (await swarm.client()).session(BLOCKS, max_length=400, max_rollback=0)
        await first.step(tokens(200))
        second = await (await swarm.client()).session(BLOCKS, max_length=400, patience=Patience(busy_s=5))
        before = trio.current_time()
        with pytest.raises(NoRoom) as caught:
            await second.step(tokens(1))
        assert caught.value.free_tokens == 112
        assert trio.current_time() - before < 10


@pytest.mark.parametrize("is_open", [False, True], ids=["at its opening", "when its last hop died"])
async def test_a_long_chain_whose_last_blocks_are_full_everywhere_waits_and_blames_nobody(open_swarm, is_open):
    async def use(session):
        await session.step(tokens(300))
        # Unused KV is lent: a session that sends nothing loses it to those that wait.
        while True:
            await session.step(tokens(1))
            await trio.sleep(4)

    async with open_swarm() as swarm, trio.open_nursery() as nursery:
        for start in range(8):
            await swarm.serve(start, start + 1)
        for _ in range(8):
            await swarm.serve(8, 9, kv_tokens=600)
        for _ in range(8):
            user = await (await swarm.client()).session(Span(8, 9))
            await user.open()
            nursery.start_soon(use, user)
        client = await swarm.client()
        session = await client.session(BLOCKS)
        dead = []
        if is_open:
            dead = [await swarm.serve(8, 9)]
            await session.open()
            # It has lived long, and seen many die.
            session._supervisor.chain.take_numbers(256 - 32 - len(session.chain))
            swarm.kill(dead[0])
        with pytest.raises(Overloaded, match="full"):
            await session.step(tokens(1))
        assert set(client.finder.failures) <= {host.peer_id for host in dead}
        assert session.reopened == len(dead)
        nursery.cancel_scope.cancel()


async def test_a_wrong_step_is_refused_and_the_session_goes_on(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS)
        row = tokens(6)
        await session.step(row[:3])
        with pytest.raises(InvalidRequest):
            await session.step(row[3:], start=5)
        assert torch.equal(await session.step(row[3:], want="all"), whole_forward(row, 9)[3:])


@pytest.mark.parametrize("is_mending", [False, True], ids=["at rest", "while a hole is filled"])
async def test_a_refused_fork_ends_the_chain_and_the_next_step_opens_another(open_swarm, whole_forward, is_mending):
    """The hops may have forked, so none of them can be kept."""
    async with open_swarm() as swarm:
        await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS, max_rows=2)
        row = tokens(4)
        await session.step(row[:3])
        supervisor = session._supervisor
        async with trio.open_nursery() as nursery:

            async def refuse() -> None:
                await trio.sleep(0.01)
                hops = supervisor.chain.controls
                if is_mending:
                    supervisor.report(HopLost(hops[1], ConnectionLost("x")))
                    await trio.sleep(0.001)
                supervisor._messages._on_failure(hops[0], Failure.of(InvalidRequest("no"), seq=2))

            nursery.start_soon(refuse)
            with pytest.raises(InvalidRequest, match="no"):
                await session.step(row[3:], row=1, start=3, ops=(Fork(0, 1, 3),))
        await trio.sleep(10)
        # Nothing is opened before there is something to send.
        assert not session.chain
        with trio.fail_after(5):
            assert torch.equal(await session.step(row[3:], want="all"), whole_forward(row, 9)[3:])
        assert session.reopened == 1


@pytest.mark.parametrize("delay_s", [0.0, 0.011, 0.021, 0.029, 0.041, 0.049])
async def test_a_cancelled_step_leaves_the_session_usable(open_swarm, whole_forward, delay_s):
    async with open_swarm() as swarm:
        await chain_of_three(swarm)
        session = await (await swarm.client()).session(BLOCKS)
        row = tokens(8)
        await session.step(row[:4])
        with trio.move_on_after(delay_s):
            await session.step(row[4:6])
        result = await session.step(row[4:], start=4, want="all")
        assert torch.equal(result, whole_forward(row, 9)[4:])


async def test_many_sessions_share_batches_and_none_sees_another(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        client = await swarm.client()
        results = {}

        async def use(seed: int) -> None:
            row = tokens(12, seed)
            session = await client.session(BLOCKS, max_length=64)
            parts = [await session.step(row[:4], want="all")]
            parts += [await session.step(row[i : i + 1]) for i in range(4, 12)]
            results[seed] = torch.equal(torch.cat(parts), whole_forward(row, 9))
            session.close()

        before = trio.current_time()
        async with trio.open_nursery() as nursery:
            for seed in range(16):
                nursery.start_soon(use, seed)
        assert results == dict.fromkeys(range(16), True)
        # One by one: 16 x 9 steps of 50 ms. Together they take hardly longer than one.
        assert trio.current_time() - before < 16 * 9 * 0.05 / 5
        assert hosts[0].task.engine.positions_computed == 16 * 12


async def test_servers_that_cannot_reach_each_other_from_the_start_are_bridged_by_their_client(
    open_swarm, whole_forward
):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        swarm.network.partition(hosts[0].ip, hosts[1].ip)
        client = await swarm.client()
        session = await client.session(BLOCKS)
        row = tokens(6)
        before = trio.current_time()
        assert torch.equal(await session.step(row[:5], want="all"), whole_forward(row, 9)[:5])
        assert trio.current_time() - before < 15
        assert torch.equal(await session.step(row[5:]), whole_forward(row, 9)[5:])
        assert (session.failovers, client.finder.failures) == (0, [])


async def test_a_broken_link_is_routed_around_where_there_is_another_server(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        client = await swarm.client()
        session = await client.session(BLOCKS)
        row = tokens(20)
        await session.step(row[:10])
        await swarm.serve(3, 6)
        swarm.network.partition(hosts[0].ip, hosts[1].ip)
        assert torch.equal(await session.step(row[10:], want="all"), whole_forward(row, 9)[10:])
        assert client.finder.failures == []


async def test_a_server_that_answers_pings_and_no_steps_does_not_hang_its_client(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        stuck = await swarm.serve(0, 9, step_s=1e6)
        session = await (await swarm.client()).session(BLOCKS)
        row = tokens(5)
        async with trio.open_nursery() as nursery:

            async def help_later() -> None:
                await trio.sleep(60)
                stuck.online = False
                await swarm.serve(0, 9)

            nursery.start_soon(help_later)
            assert torch.equal(await session.step(row, want="all"), whole_forward(row, 9))
        assert trio.current_time() < 300


class First(Random):
    """Of what is equally good, the first."""

    def choice(self, seq):
        return seq[0]


async def test_twins_that_hang_do_not_use_up_the_patience_that_the_next_one_needs(open_swarm, whole_forward):
    """Each that is announced still, but answers nothing, costs seconds; as long as there is another, it is asked."""
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        client = await swarm.client()
        client.finder.random = First()
        session = await client.session(BLOCKS, patience=Patience(missing_s=5))
        row = tokens(12)
        await session.step(row[:5])
        for _ in range(3):
            hung = await swarm.serve(3, 6)
            swarm.freeze(hung)
            hung.online = True
        twin = await swarm.serve(3, 6)
        swarm.kill(hosts[1])
        assert torch.equal(await session.step(row[5:], want="all"), whole_forward(row, 9)[5:])
        assert session.chain[1].peer == twin.peer_id


async def test_a_twin_that_does_not_serve_yet_costs_no_step_after_one_that_hangs(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        hosts = await chain_of_three(swarm)
        client = await swarm.client()
        client.finder.random = First()
        session = await client.session(BLOCKS, patience=Patience(missing_s=5))
        row = tokens(12)
        await session.step(row[:5])
        hung, starting, _ = [await swarm.serve(3, 6) for _ in range(3)]
        swarm.freeze(hung)
        hung.online = True
        # Its announcement outlived its restart.
        starting.server._spans.all = tuple(replace(served, model=bytes(32)) for served in starting.server.spans)
        swarm.kill(hosts[1])
        assert torch.equal(await session.step(row[5:], want="all"), whole_forward(row, 9)[5:])


LLAMA = Span(0, 8)


async def llama_with_overflow(swarm, serve_tiny, twins):
    await serve_tiny(swarm, Span(0, 3))
    hosts = [await serve_tiny(swarm, Span(3, 7), dtype=torch.float16, overflows=True) for _ in range(twins)]
    await serve_tiny(swarm, Span(7, 8))
    return hosts


@pytest.mark.parametrize("twins", [1, 2, 3])
async def test_blocks_that_overflow_are_named_at_once_with_what_to_do(open_swarm, serve_tiny, caplog, twins):
    async with open_swarm() as swarm:
        await llama_with_overflow(swarm, serve_tiny, twins)
        client = await swarm.client()
        session = await client.session(LLAMA, width=32, max_length=64)
        hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        before = trio.current_time()
        reason = r"blocks 3:7 gave NaN or infinity in float16: .* serve with --dtype bfloat16"
        with pytest.raises(BadResult, match=reason):
            await session.step(hidden)
        # There is no other peer to wait for.
        assert trio.current_time() - before < 2
        said = [record.message for record in caplog.records if "--dtype bfloat16" in record.message]
        assert len([message for message in said if message.startswith("blocks 3:7 gave")]) == min(twins, 2)
        # No peer is shunned for it: what they answer, they answer at once, and to the same session too.
        with pytest.raises(BadResult, match=reason):
            await session.step(hidden)
        assert trio.current_time() - before < 4
        assert not client.finder.failures


async def test_a_peer_in_another_dtype_takes_the_place_of_one_that_overflows(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        (bad,) = await llama_with_overflow(swarm, serve_tiny, 1)
        client = await swarm.client()
        session = await client.session(LLAMA, width=32, max_length=64)
        await session.open()
        await serve_tiny(swarm, Span(3, 7))
        result = await session.step(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)))
        assert result.isfinite().all()
        # Where another answers, the first was wrong.
        assert bad.peer_id in client.finder.failures
