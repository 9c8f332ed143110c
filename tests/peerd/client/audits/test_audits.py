"""Servers that compute something else are found and avoided; honest ones never are, however they round or die."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import trio
import trio.testing

from peerd.client.audits.policy import AuditPolicy
from peerd.client.session.opener import Terms
from peerd.protocol.rows import Drop, Fork, RowSlice, SessionSize
from tests.peerd.client.audits.conftest import FULL, HALF, INT8, LENGTH, NF4, SPANS, Lie, run_text, texts
from tests.peerd.conftest import MODEL


@dataclass
class Counted(Lie):
    """Calls `then` in its nth batch, and goes on as `lie` would."""

    nth: int
    then: Callable[[], None] = lambda: None
    lie: Lie = field(default_factory=Lie)

    def spoil(self, model):
        self.lie.spoil(model)

    def change(self, inputs, output):
        self.nth -= 1
        if self.nth == 0:
            self.then()
        return self.lie.change(inputs, output)


class SkipsABlock(Lie):
    def spoil(self, model):
        layer = model.layers[1]
        with torch.no_grad():
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()


class ReturnsItsInput(Lie):
    def change(self, inputs, output):
        return inputs


class ReturnsStaleOutput(Lie):
    """Sends for each position what belongs to the position before."""

    last: torch.Tensor | None = None

    def change(self, inputs, output):
        before = output[:1] if self.last is None else self.last
        self.last = output[-1:]
        return torch.cat([before, output[:-1]])


class HasOtherWeights(Lie):
    def spoil(self, model):
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in model.layers.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std())


class AddsNoise(Lie):
    def change(self, inputs, output):
        added = output - inputs
        return output + 0.01 * added.norm(dim=1, keepdim=True) * torch.randn_like(output) / output.shape[1] ** 0.5


LIES = {
    "skips a block": (SkipsABlock(), FULL),
    "returns its input": (ReturnsItsInput(), FULL),
    "returns stale outputs": (ReturnsStaleOutput(), FULL),
    "has other weights": (HasOtherWeights(), FULL),
    "announces no quantization, and has nf4": (Lie(), NF4),
    "adds noise of 1 %": (AddsNoise(), FULL),
}


@pytest.mark.parametrize(("name", "at"), [*((name, 1) for name in LIES), ("skips a block", 0), ("skips a block", 2)])
async def test_a_liar_is_found_by_one_audit_and_avoided(open_tribunal, name, at):
    lie, numerics = LIES[name]
    async with open_tribunal() as tribunal:
        hosts = [
            await tribunal.serve(span, numerics, announced=FULL, lie=lie) if hop == at else await tribunal.serve(span)
            for hop, span in enumerate(SPANS)
        ]
        await tribunal.answer()
        for _ in range(2):
            await tribunal.serve_all()
        await tribunal.audit()
        liar = hosts[at].peer_id
        assert tribunal.convicted == [liar]
        assert tribunal.auditor.counts == {"chosen": 1, "convicted": 1}
        assert liar in tribunal.client.finder.avoided()
        session = await tribunal.open()
        await run_text(session, 6)
        assert liar not in {hop.peer for hop in session.chain}


async def test_a_liar_among_those_who_check_is_found_too(open_tribunal):
    async with open_tribunal() as tribunal:
        await tribunal.serve_all()
        await tribunal.answer()
        third = await tribunal.serve(SPANS[1])
        third.online = False
        liar = await tribunal.serve(
            SPANS[1], lie=Counted(nth=1, then=lambda: setattr(third, "online", True), lie=ReturnsItsInput())
        )
        for span in (SPANS[0], SPANS[2]):
            await tribunal.serve(span)
        await tribunal.audit()
        assert tribunal.convicted == [liar.peer_id]


@pytest.mark.parametrize(
    ("answers", "checks"),
    [(FULL, HALF), (FULL, NF4), (INT8, HALF), (NF4, NF4), (NF4, INT8)],
    ids=str,
)
async def test_honest_servers_of_different_numerics_agree(open_tribunal, answers, checks):
    async with open_tribunal() as tribunal:
        await tribunal.serve_all(answers)
        await tribunal.answer()
        await tribunal.serve_all(checks)
        await tribunal.audit()
        assert tribunal.auditor.counts == {"chosen": 1, "agreed": 1}


async def test_audits_compute_with_the_length_of_the_prompt_that_the_answer_had(open_tribunal):
    """The ropes of some models depend on it, so others would compute something else."""
    async with open_tribunal() as tribunal:
        await tribunal.serve_all()
        await tribunal.answer()
        checkers = await tribunal.serve_all()
        opened = []

        def noting(open_it):
            def open_and_note(*arguments, **options):
                opened.extend(argument for argument in arguments if isinstance(argument, SessionSize))
                return open_it(*arguments, **options)

            return open_and_note

        for host in checkers:
            host.task.engine.open = noting(host.task.engine.open)
        await tribunal.audit()
        assert [size.prompt_length for size in opened] == [10] * len(SPANS)


async def test_each_answer_of_a_session_that_rests_is_audited_by_itself(open_tribunal):
    async with open_tribunal() as tribunal:
        await tribunal.serve_all()
        session = await tribunal.open(max_rollback=128)
        await run_text(session, 5)
        session.rest()
        await tribunal.serve_all()
        await tribunal.audit()
        assert tribunal.auditor.counts == {"chosen": 1, "agreed": 1}
        terms = session.spec.terms
        tribunal.auditor.watch(session, session.spec.blocks, terms)
        # It goes on from the middle of what it had.
        (row,) = texts(1, 6)
        await session.step(row[12:], start=12, want="all")
        session.close()
        await trio.testing.wait_all_tasks_blocked()
        await tribunal.audit()
        assert tribunal.auditor.counts == {"chosen": 2, "agreed": 2}


async def run_several(session, rows, ends_first):
    """Several answers to one prompt, of which one ends before the others."""
    (text,) = texts(1, 5)
    await session.step(text[:10], row=0)
    ops = tuple(Fork(0, row, 10) for row in range(1, rows))
    live = list(range(rows))
    for position in range(10, LENGTH):
        if position == LENGTH - 4:
            live.remove(ends_first)
            ops = (Drop(ends_first),)
        inputs = torch.stack([text[position] + row for row in live])
        await session.step(inputs, rows=[RowSlice(row, position, 1) for row in live], ops=ops, want="all")
        ops = ()
    session.close()
    await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("ends_first", range(3))
async def test_one_of_several_answers_to_a_prompt_is_audited_whichever_ends_first(open_tribunal, ends_first):
    async with open_tribunal() as tribunal:
        liar = [await tribunal.serve(span, lie=SkipsABlock() if hop == 1 else None) for hop, span in enumerate(SPANS)][
            1
        ]
        await run_several(await tribunal.open(max_rows=3, max_rollback=10), 3, ends_first)
        for _ in range(2):
            await tribunal.serve_all()
        await tribunal.audit()
        assert tribunal.convicted == [liar.peer_id]


async def test_honest_servers_of_several_answers_agree(open_tribunal):
    async with open_tribunal() as tribunal:
        await tribunal.serve_all()
        for ends_first in range(3):
            await run_several(await tribunal.open(max_rows=3, max_rollback=10), 3, ends_first)
        await tribunal.serve_all()
        await tribunal.audit()
        assert tribunal.auditor.counts == {"chosen": 3, "agreed": 3}


async def test_servers_of_one_network_do_not_check_one_another(open_tribunal):
    async with open_tribunal("8.8.4.{}") as tribunal:
        await tribunal.serve_all()
        await tribunal.answer()
        await tribunal.serve_all()
        await tribunal.audit()
        assert tribunal.auditor.counts == {"chosen": 1, "skipped": 1}
        assert "no other servers in other networks" in tribunal.auditor.last.why


async def test_nobody_is_blamed_where_a_checking_server_dies(open_tribunal):
    async with open_tribunal() as tribunal:
        await tribunal.serve_all()
        await tribunal.answer()
        dies = Counted(nth=1)
        host = await tribunal.serve(SPANS[1], lie=dies)
        dies.then = lambda: tribunal.swarm.kill(host)
        for span in (SPANS[0], SPANS[2]):
            await tribunal.serve(span)
        await tribunal.audit()
        assert tribunal.auditor.counts == {"chosen": 1, "unfinished": 1}
        assert tribunal.convicted == tribunal.client.finder.failures == []


async def test_nobody_is_blamed_where_a_server_dies_while_the_liar_is_searched(open_tribunal):
    async with open_tribunal() as tribunal:
        steps = 1 + LENGTH - 10
        dies = Counted(nth=steps + 1, lie=SkipsABlock())
        await tribunal.serve(SPANS[0])
        host = await tribunal.serve(SPANS[1], lie=dies)
        dies.then = lambda: tribunal.swarm.kill(host)
        await tribunal.serve(SPANS[2])
        await tribunal.answer()
        for _ in range(2):
            await tribunal.serve_all()
        await tribunal.audit()
        assert dies.nth <= 0
        assert tribunal.auditor.counts == {"chosen": 1, "unexplained": 1}
        assert tribunal.convicted == tribunal.client.finder.failures == []


async def test_without_a_third_server_nobody_is_convicted(open_tribunal):
    async with open_tribunal() as tribunal:
        await tribunal.serve(SPANS[0])
        await tribunal.serve(SPANS[1], lie=SkipsABlock())
        await tribunal.serve(SPANS[2])
        await tribunal.answer()
        await tribunal.serve_all()
        await tribunal.audit()
        assert tribunal.auditor.counts == {"chosen": 1, "unexplained": 1}
        assert tribunal.convicted == []


class LiesOnlyInAnswers(SkipsABlock):
    """Honest where many positions come at once, as in audits."""

    def spoil(self, model):
        pass

    def change(self, inputs, output):
        return output if len(output) > 1 else inputs


async def test_a_liar_that_is_honest_when_it_is_asked_again_is_found_by_its_part_in_several_audits(open_tribunal):
    async with open_tribunal() as tribunal:
        liar = await tribunal.serve(SPANS[1], lie=LiesOnlyInAnswers())
        for seed in range(3):
            ends = [await tribunal.serve(span) for span in (SPANS[0], SPANS[2])]
            await tribunal.answer(seed)
            checks = await tribunal.serve_all()
            await tribunal.audit()
            for host in (*ends, *checks):
                tribunal.swarm.kill(host)
        assert tribunal.auditor.counts == {"chosen": 3, "unexplained": 2, "convicted": 1}
        assert tribunal.convicted == [liar.peer_id]


async def test_an_audit_gives_way_to_the_user(open_tribunal):
    async with open_tribunal() as tribunal:
        gone = await tribunal.serve_all()
        await tribunal.answer()
        for host in gone:
            host.online = False
        slow = [await tribunal.serve(span, step_s=10.0) for span in SPANS]
        await trio.sleep(40)
        session = await tribunal.open()
        await session.open()
        assert {hop.peer for hop in session.chain} == {host.peer_id for host in slow}
        for host in gone:
            host.online = True
        await tribunal.audit()
        assert tribunal.auditor.counts == {"chosen": 2, "skipped": 1}
        session.close()


async def test_an_audit_that_runs_ends_when_the_user_needs_its_servers(open_tribunal):
    async with open_tribunal() as tribunal:
        gone = await tribunal.serve_all()
        await tribunal.answer()
        opened = trio.Event()
        began = Counted(nth=1, then=opened.set)
        slow = [await tribunal.serve(span, step_s=10.0, lie=began if span == SPANS[0] else None) for span in SPANS]
        await opened.wait()
        for host in gone:
            tribunal.swarm.kill(host)
        session = await tribunal.open()
        await session.open()
        assert {hop.peer for hop in session.chain} == {host.peer_id for host in slow}
        await tribunal.audit()
        assert tribunal.auditor.counts == {"chosen": 2, "unfinished": 1}
        assert "the user's own sessions" in tribunal.auditor.last.why
        session.close()


async def test_an_audit_gives_up_at_once_where_servers_take_no_sessions(open_tribunal):
    async with open_tribunal() as tribunal:
        await tribunal.serve_all()
        await tribunal.answer()
        for host in await tribunal.serve_all():
            host.server.draining = True
        before = trio.current_time()
        await tribunal.audit()
        assert tribunal.auditor.counts == {"chosen": 1, "unfinished": 1}
        assert trio.current_time() - before < 40
        assert tribunal.client.finder.failures == tribunal.convicted == []


async def test_answers_that_are_too_short_or_changed_servers_are_not_audited(open_tribunal):
    async with open_tribunal() as tribunal:
        hosts = await tribunal.serve_all()
        session = await tribunal.open()
        await session.step(torch.ones(20, 64))
        session.close()
        await trio.testing.wait_all_tasks_blocked()
        assert tribunal.auditor.counts == {"chosen": 1, "too short": 1}
        await tribunal.serve_all()
        session = await tribunal.open()
        await session.step(torch.ones(5, 64))
        chosen = session.chain[1].peer
        tribunal.swarm.kill(next(host for host in tribunal.swarm.hosts if host.peer_id == chosen))
        for _ in range(30):
            await session.step(torch.ones(1, 64))
        session.close()
        await trio.testing.wait_all_tasks_blocked()
        assert tribunal.auditor.counts == {"chosen": 2, "too short": 1, "servers changed": 1}
        assert hosts


async def test_only_a_share_of_the_answers_is_chosen_by_the_given_chance(open_tribunal):
    async with open_tribunal() as tribunal:
        tribunal.auditor.probability = 0.25
        await tribunal.serve_all()
        session = await tribunal.open()
        terms = Terms(MODEL, SessionSize(8), 4, "float32", "exact", 2000)
        for _ in range(1000):
            tribunal.auditor.watch(session, SPANS[0], terms)
        assert 200 < tribunal.auditor.counts["chosen"] < 300
        session.close()


def test_audits_are_on_among_strangers_and_off_in_a_private_swarm():
    assert AuditPolicy.of(None, is_private=False).probability == pytest.approx(1 / 50)
    assert AuditPolicy.of(None, is_private=True).probability == 0
    assert AuditPolicy.of(0.5, is_private=True).probability == 0.5
    with pytest.raises(ValueError, match="between 0 and 1"):
        AuditPolicy.of(1.5, is_private=False)
