"""One hop of a session in use is checked: liars are found, even those that are honest when they are asked again."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch
import trio
import trio.testing

from peerd.client.audits import auditor as auditor_module
from peerd.client.audits.replay_audit import UNLIKE, hop_to_check
from peerd.server.sessions import hosted_session
from peerd.server.sessions.sketching import Sketching
from tests.peerd.client.audits.conftest import FULL, HALF, INT8, NF4, SPANS, WIDTH
from tests.peerd.client.audits.test_audits import LIES, LiesOnlyInAnswers, ReturnsItsInput, SkipsABlock

PROMPT, LENGTH = 24, 64


@asynccontextmanager
async def checking(open_tribunal, monkeypatch, at, **options):
    """A tribunal whose sessions check their hop number `at` once they have 40 positions."""
    monkeypatch.setattr(auditor_module, "positions_before", lambda random: 40)
    monkeypatch.setattr(auditor_module, "hop_to_check", lambda chance, probability, hops: at)
    async with open_tribunal(**options) as tribunal:
        tribunal.is_sketched = True
        yield tribunal


async def chain(tribunal, at=None, lie=None, numerics=FULL, announced=None):
    """Servers of one chain, of which one lies."""
    return [
        await tribunal.serve(span, numerics, announced=announced, lie=lie)
        if hop == at
        else await tribunal.serve(span, FULL if announced else numerics)
        for hop, span in enumerate(SPANS)
    ]


async def talk(tribunal, session, seed=5, positions=range(PROMPT, LENGTH)):
    row = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    if positions.start == PROMPT:
        await session.step(row[:PROMPT])
    for position in positions:
        await session.step(row[position : position + 1])


async def check(tribunal, others=2, seed=5):
    """A session with the servers that there are, which is checked by those that come then; it ends after that."""
    session = await tribunal.open(PROMPT)
    await talk(tribunal, session, seed, range(PROMPT, 36))
    used = [served.peer for served in session.chain]
    extra = [host for _ in range(others) for host in await tribunal.serve_all()]
    await talk(tribunal, session, seed, range(36, LENGTH))
    await tribunal.audit()
    assert [served.peer for served in session.chain] == used
    session.close()
    await trio.testing.wait_all_tasks_blocked()
    return extra


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("name", ["skips a block", "adds noise of 1 %"])
async def test_a_liar_is_found_at_each_place_of_the_chain(open_tribunal, monkeypatch, name, at):
    lie, numerics = LIES[name]
    async with checking(open_tribunal, monkeypatch, at) as tribunal:
        hosts = await chain(tribunal, at, lie, numerics, announced=FULL)
        await check(tribunal)
        assert tribunal.convicted == [hosts[at].peer_id]
        assert tribunal.auditor.replay_counts == {"chosen": 1, "convicted": 1}
        assert tribunal.client.finder.failures == []


@pytest.mark.parametrize("at", range(3))
async def test_an_honest_hop_beside_a_liar_is_acquitted(open_tribunal, monkeypatch, at):
    """The other server gets what the hop got, however untrue that is."""
    async with checking(open_tribunal, monkeypatch, at) as tribunal:
        await chain(tribunal, (at + 1) % 3, SkipsABlock())
        await check(tribunal)
        assert tribunal.auditor.replay_counts == {"chosen": 1, "agreed": 1}


@pytest.mark.parametrize(
    ("answers", "checks", "at"),
    [(FULL, HALF, 0), (HALF, INT8, 1), (INT8, FULL, 2), (NF4, NF4, 2), (NF4, INT8, 1)],
    ids=str,
)
async def test_honest_servers_of_different_numerics_agree(open_tribunal, monkeypatch, answers, checks, at):
    async with checking(open_tribunal, monkeypatch, at) as tribunal:
        await chain(tribunal, numerics=answers)
        session = await tribunal.open(PROMPT)
        await talk(tribunal, session, positions=range(PROMPT, 36))
        await tribunal.serve_all(checks)
        await talk(tribunal, session, positions=range(36, LENGTH))
        await tribunal.audit()
        assert tribunal.auditor.replay_counts == {"chosen": 1, "agreed": 1}


async def test_a_last_hop_that_is_honest_when_it_is_asked_again_is_convicted_by_its_answers(open_tribunal, monkeypatch):
    async with checking(open_tribunal, monkeypatch, 2) as tribunal:
        hosts = await chain(tribunal, 2, LiesOnlyInAnswers())
        await check(tribunal)
        assert tribunal.convicted == [hosts[2].peer_id]


@pytest.mark.parametrize("at", [0, 1])
async def test_a_hop_before_others_that_is_honest_when_it_is_asked_again_is_found_after_three_checks(
    open_tribunal, monkeypatch, at
):
    async with checking(open_tribunal, monkeypatch, at) as tribunal:
        liar = await tribunal.serve(SPANS[at], lie=LiesOnlyInAnswers())
        for seed in range(3):
            ends = [await tribunal.serve(span) for span in SPANS if span != SPANS[at]]
            for host in [*ends, *await check(tribunal, seed=seed)]:
                tribunal.swarm.kill(host)
        assert tribunal.auditor.replay_counts == {"chosen": 3, "unexplained": 2, "convicted": 1}
        assert tribunal.convicted == [liar.peer_id]


def forge(monkeypatch, at, change):
    """Have the hop number `at` of each chain tell sketches of something else than it received."""

    class Forged(Sketching):
        def __init__(self, opening, *rest):
            super().__init__(opening, *rest)
            self._forges = opening.start == SPANS[at].start and opening.hop < len(SPANS)

        def received(self, step, hidden):
            super().received(step, change(hidden) if self._forges else hidden)

    monkeypatch.setattr(hosted_session, "Sketching", Forged)


def other_values(hidden):
    return hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("at", [0, 1])
async def test_a_hop_that_lies_about_what_it_was_sent_brings_no_conviction_on_the_hop_before(
    open_tribunal, monkeypatch, at
):
    forge(monkeypatch, at + 1, other_values)
    async with checking(open_tribunal, monkeypatch, at) as tribunal:
        await chain(tribunal)
        await check(tribunal)
        assert tribunal.auditor.replay_counts == {"chosen": 1, "unexplained": 1}
        assert "computed again, it is not" in tribunal.auditor.last.why
        assert tribunal.convicted == []


async def test_a_hop_that_lies_about_what_it_was_sent_is_found_after_three_checks(open_tribunal, monkeypatch):
    forge(monkeypatch, 1, other_values)
    async with checking(open_tribunal, monkeypatch, 0) as tribunal:
        liar = await tribunal.serve(SPANS[1])
        for seed in range(3):
            ends = [await tribunal.serve(span) for span in (SPANS[0], SPANS[2])]
            for host in [*ends, *await check(tribunal, seed=seed)]:
                tribunal.swarm.kill(host)
        assert tribunal.convicted == [liar.peer_id]


async def test_a_hop_that_says_it_was_sent_something_else_than_the_others_is_in_dispute(open_tribunal, monkeypatch):
    forge(monkeypatch, 1, other_values)
    async with checking(open_tribunal, monkeypatch, 1) as tribunal:
        await chain(tribunal, 1, SkipsABlock())
        await check(tribunal)
        assert tribunal.auditor.replay_counts == {"chosen": 1, "unexplained": 1}
        assert UNLIKE in tribunal.auditor.last.why


async def test_a_malformed_sketch_costs_a_hop_its_place(open_tribunal, monkeypatch):
    forge(monkeypatch, 1, lambda hidden: hidden[:-1])
    async with checking(open_tribunal, monkeypatch, 1) as tribunal:
        hosts = await chain(tribunal)
        session = await tribunal.open(PROMPT)
        await session.open()
        monkeypatch.setattr(hosted_session, "Sketching", Sketching)
        other = await tribunal.serve(SPANS[1])
        await talk(tribunal, session)
        assert tribunal.client.finder.failures == [hosts[1].peer_id]
        assert session.chain[1].peer == other.peer_id
        session.close()


@pytest.mark.parametrize("at", range(3))
async def test_a_liar_among_those_who_check_is_found(open_tribunal, monkeypatch, at):
    async with checking(open_tribunal, monkeypatch, at) as tribunal:
        await chain(tribunal)
        session = await tribunal.open(PROMPT)
        await talk(tribunal, session, positions=range(PROMPT, 36))
        third = await tribunal.serve(SPANS[at])
        third.online = False
        liar = await tribunal.serve(SPANS[at], lie=TellsThen(lambda: setattr(third, "online", True)))
        await talk(tribunal, session, positions=range(36, LENGTH))
        await tribunal.audit()
        assert tribunal.convicted == [liar.peer_id]
        session.close()


class TellsThen(ReturnsItsInput):
    def __init__(self, then):
        self.then = then

    def change(self, inputs, output):
        self.then()
        return super().change(inputs, output)


async def test_without_another_server_nothing_is_checked(open_tribunal, monkeypatch):
    async with checking(open_tribunal, monkeypatch, 1) as tribunal:
        await chain(tribunal, 1, SkipsABlock())
        await check(tribunal, others=0)
        assert tribunal.auditor.replay_counts == {"chosen": 1, "skipped": 1}


async def test_without_a_third_server_nobody_is_convicted(open_tribunal, monkeypatch):
    async with checking(open_tribunal, monkeypatch, 1) as tribunal:
        await chain(tribunal, 1, SkipsABlock())
        await check(tribunal, others=1)
        assert tribunal.auditor.replay_counts == {"chosen": 1, "unexplained": 1}
        assert tribunal.convicted == []


@pytest.mark.parametrize("silent", range(3))
async def test_hops_that_know_nothing_of_sketches_are_left_in_peace(open_tribunal, monkeypatch, silent):
    class Silent(Sketching):
        def __init__(self, opening, *rest):
            super().__init__(opening, *rest)
            self._is_silent = opening.start == SPANS[silent].start

        def received(self, step, hidden):
            if not self._is_silent:
                super().received(step, hidden)

    monkeypatch.setattr(hosted_session, "Sketching", Silent)
    async with checking(open_tribunal, monkeypatch, 1) as tribunal:
        await chain(tribunal)
        await check(tribunal)
        assert tribunal.auditor.replay_counts == {"chosen": 1, "unfinished": 1}
        assert tribunal.convicted == tribunal.client.finder.failures == []


async def test_a_session_that_asked_for_no_sketches_is_not_checked(open_tribunal, monkeypatch):
    async with checking(open_tribunal, monkeypatch, 1) as tribunal:
        tribunal.is_sketched = False
        await chain(tribunal)
        await check(tribunal)
        assert tribunal.auditor.replay_counts == {}


@pytest.mark.parametrize("at", range(3))
async def test_a_session_that_cuts_its_row_all_the_time_is_checked(open_tribunal, monkeypatch, at):
    """As one that speculates."""
    async with checking(open_tribunal, monkeypatch, at) as tribunal:
        await chain(tribunal)
        session = await tribunal.open(PROMPT, max_rollback=8)
        row = torch.randn(LENGTH + 16, WIDTH, generator=torch.Generator().manual_seed(5))
        await session.step(row[:PROMPT])
        await tribunal.serve_all()
        for start in range(PROMPT, LENGTH, 2):
            await session.step(row[start : start + 5], start=start, want="all")
        await tribunal.audit()
        assert tribunal.auditor.replay_counts == {"chosen": 1, "agreed": 1}
        session.close()


@pytest.mark.parametrize("change", [{"own_adapter": {}}, {"codec": "int8"}], ids=str)
async def test_sessions_with_own_weights_or_a_lossy_codec_are_not_checked(open_tribunal, monkeypatch, change):
    async with checking(open_tribunal, monkeypatch, 1) as tribunal:
        await chain(tribunal)
        session = await tribunal.open(PROMPT)
        terms = replace(session.spec.terms, **change)
        tribunal.auditor.watch(session, session.spec.blocks, terms)
        await talk(tribunal, session)
        await tribunal.audit()
        assert tribunal.auditor.replay_counts == {}
        session.close()


async def test_nobody_is_blamed_where_the_row_is_cut_while_a_hop_is_checked(open_tribunal, monkeypatch):
    async with checking(open_tribunal, monkeypatch, 1) as tribunal:
        await chain(tribunal)
        session = await tribunal.open(PROMPT, max_rollback=64)
        await talk(tribunal, session, positions=range(PROMPT, 36))
        await tribunal.serve(SPANS[1], step_s=20.0)
        await talk(tribunal, session, positions=range(36, LENGTH))
        await session.step(torch.ones(4, WIDTH), start=8)
        await tribunal.audit()
        assert tribunal.auditor.replay_counts == {"chosen": 1, "unfinished": 1}
        assert tribunal.convicted == []
        session.close()


async def test_a_session_that_ends_meanwhile_leaves_its_check_unfinished(open_tribunal, monkeypatch):
    async with checking(open_tribunal, monkeypatch, 1) as tribunal:
        await chain(tribunal)
        session = await tribunal.open(PROMPT)
        await talk(tribunal, session, positions=range(PROMPT, 36))
        await tribunal.serve(SPANS[1], step_s=20.0)
        await talk(tribunal, session, positions=range(36, LENGTH))
        session.close()
        await tribunal.audit()
        assert tribunal.auditor.replay_counts == {"chosen": 1, "unfinished": 1}
        assert tribunal.convicted == tribunal.client.finder.failures == []


def test_each_hop_is_checked_with_the_given_probability():
    draws = [hop_to_check(number / 30_000, 1 / 50, 3) for number in range(30_000)]
    assert [draws.count(at) for at in (0, 1, 2, None)] == [600, 600, 600, 28_200]


def test_of_a_long_chain_or_at_a_high_probability_one_hop_is_checked():
    draws = [hop_to_check(number / 30_000, 0.5, 3) for number in range(30_000)]
    assert [draws.count(at) for at in range(3)] == [10_000] * 3


def test_no_hop_is_checked_at_probability_zero():
    assert hop_to_check(0.0, 0.0, 3) is None
