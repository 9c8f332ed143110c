"""Training through a swarm equals autograd on the whole model, whichever peers die on the way."""

from __future__ import annotations

import random

import pytest
import torch
import trio

from peerd.client.finding.finder import Patience
from peerd.client.training.pass_maker import PassMaker
from peerd.client.training.trained import Trained
from peerd.exchange.refusals import refuse
from peerd.protocol.errors import BadResult, InvalidRequest, NoChain, NoRoom
from peerd.protocol.messages.training import PASS_PROTOCOL, PassFailure
from peerd.protocol.span import Span

MODEL = bytes(range(32))
BLOCKS = Span(0, 8)
CUT = (Span(0, 3), Span(3, 7), Span(7, 8))
WIDTH = 32
ROWS = (24, 7, 24, 20)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
SHORT = Patience(missing_s=2.0, busy_s=6.0)


@pytest.fixture(autouse=True)
def _one_turn_a_slice(monkeypatch):
    """How many turns a slice has depends on the machine's speed, and with it all times here."""
    monkeypatch.setattr("peerd.server.device_queue.SLICE_S", 0.0)


@pytest.fixture(scope="module")
def decoder(tiny_llama):
    """Transformers' own, without its final norm."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval().requires_grad_(False).model
    model.norm = torch.nn.Identity()
    return model


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(prompts=1):
    lora = {
        (block, module): (0.3 * normal(2, WIDTH, seed=block), 0.3 * normal(wide, 2, seed=block + 9))
        for block in (0, 4, 7)
        for module, wide in (("self_attn.q_proj", 32), ("mlp.gate_proj", 48))
    }
    return Trained(0.3 * normal(8, prompts, 3, WIDTH, seed=5), lora, scaling=1.5)


class Reference:
    """What autograd says, a row at a time."""

    def __init__(self, decoder, hidden, grad, what, rows=ROWS):
        leaves = [hidden.clone().requires_grad_()]
        prompts = what.prompts.clone().requires_grad_() if what.prompts is not None else None
        pairs = {key: tuple(t.clone().requires_grad_() for t in pair) for key, pair in what.lora.items()}
        outputs = [
            self._row(decoder, row, number, prompts, pairs, what.scaling)
            for number, row in enumerate(torch.split(leaves[0], rows))
        ]
        self.output = torch.cat(outputs)
        self.output.backward(grad)
        self.hidden = leaves[0].grad
        self.prompts = prompts.grad if prompts is not None else None
        self.lora = {key: tuple(t.grad for t in pair) for key, pair in pairs.items()}

    @staticmethod
    def _row(decoder, row, number, prompts, pairs, scaling):
        handles = []
        for block, layer in enumerate(decoder.layers):
            if prompts is not None:
                own = prompts[block, number if prompts.shape[1] > 1 else 0]

                def add(_, args, own=own):
                    return (args[0] + torch.cat((own, torch.zeros(args[0].shape[1] - len(own), WIDTH))), *args[1:])

                handles.append(layer.register_forward_pre_hook(add))
            for (of_block, module), (down, up) in pairs.items():
                if of_block == block:

                    def delta(_, args, output, down=down, up=up):
                        return output + scaling * args[0] @ down.T @ up.T

                    handles.append(layer.get_submodule(module).register_forward_hook(delta))
        try:
            return decoder(inputs_embeds=row[None], use_cache=False).last_hidden_state[0]
        finally:
            for handle in handles:
                handle.remove()


def assert_same(output, gradients, expected):
    torch.testing.assert_close(output, expected.output.detach(), **TOLERANCE)
    torch.testing.assert_close(gradients.hidden, expected.hidden, **TOLERANCE)
    if expected.prompts is None:
        assert gradients.prompts is None
    else:
        torch.testing.assert_close(gradients.prompts, expected.prompts, **TOLERANCE)
    assert set(gradients.lora) == set(expected.lora)
    for key, pair in expected.lora.items():
        torch.testing.assert_close(gradients.lora[key], pair, **TOLERANCE)


def maker_of(client, finder=None):
    return PassMaker(finder or client.finder, client.connections, MODEL, WIDTH, "float32", random.Random(1))


INPUT, GRAD = normal(sum(ROWS), WIDTH, seed=1), normal(sum(ROWS), WIDTH, seed=2)


@pytest.mark.parametrize("prompts", [1, len(ROWS)], ids=["a shared prompt", "a prompt a row"])
async def test_forward_and_backward_through_three_hops_equal_autograd(open_swarm, serve_tiny, decoder, prompts):
    async with open_swarm() as swarm:
        for span in CUT:
            await serve_tiny(swarm, span)
        maker = maker_of(await swarm.client())
        what = trained(prompts)
        done = await maker.forward(INPUT, ROWS, BLOCKS, what)
        gradients = await done.backward(GRAD)
        assert_same(done.output, gradients, Reference(decoder, INPUT, GRAD, what))
        assert [hop.span.end for hop in done.chain] == [3, 7, 8]


@pytest.fixture
def small_micro_batches(monkeypatch):
    """A row or two each, so that the few rows here make a pipeline."""
    monkeypatch.setattr("peerd.client.training.rows.LEAST_POSITIONS", 24)
    monkeypatch.setattr("peerd.client.training.rows.MICRO_BATCHES_A_HOP", 1)


async def test_micro_batches_are_on_all_hops_at_once(open_swarm, serve_tiny, decoder, small_micro_batches):
    async with open_swarm() as swarm:
        for span in CUT:
            await serve_tiny(swarm, span)
        maker = maker_of(await swarm.client())
        rows, inputs, grad = (20,) * 8, normal(160, WIDTH, seed=1), normal(160, WIDTH, seed=2)
        took = []
        for count in (2, 8):
            began = trio.current_time()
            part = slice(0, 20 * count)
            done = await maker.forward(inputs[part], rows[:count], BLOCKS, Trained())
            took.append(trio.current_time() - began)
        gradients = await done.backward(grad)
        assert_same(done.output, gradients, Reference(decoder, inputs, grad, Trained(), rows))
        # Four times the work, in far less than four times the time.
        assert took[1] < 2.2 * took[0]


async def test_many_requests_share_the_peers_where_one_stays_with_one(open_swarm, serve_tiny, small_micro_batches):
    async with open_swarm() as swarm:
        for _ in range(3):
            await serve_tiny(swarm, BLOCKS)
        maker = maker_of(await swarm.client())
        with await maker.forward(normal(20, WIDTH), (20,), BLOCKS, Trained()) as one:
            assert len(one.chain) == 1
        with await maker.forward(normal(320, WIDTH), (20,) * 16, BLOCKS, Trained()) as many:
            assert len({hop.peer for chain in many.chains for hop in chain}) == 3
            # Whole copies stand side by side: each row travels to one peer only.
            assert [len(chain) for chain in many.chains] == [1, 1, 1]


async def test_rows_share_two_chains_and_gradients_are_exact_also_if_one_of_them_loses_a_hop(
    open_swarm, serve_tiny, decoder, small_micro_batches
):
    async with open_swarm() as swarm:
        # A third peer for each part, for the chain that loses one.
        hosts = [await serve_tiny(swarm, span) for span in (*CUT, *CUT, *CUT)]
        for spare in hosts[6:]:
            spare.online = False
        maker = maker_of(await swarm.client())
        rows, inputs, grad = (20,) * 8, normal(160, WIDTH, seed=1), normal(160, WIDTH, seed=2)
        what = trained()
        done = await maker.forward(inputs, rows, BLOCKS, what, patience=SHORT)
        first, second = done.chains
        assert [hop.span for hop in first] == [hop.span for hop in second] == list(CUT)
        assert not {hop.peer for hop in first} & {hop.peer for hop in second}
        for spare in hosts[6:]:
            spare.online = True
        swarm.kill(next(host for host in hosts if host.peer_id == second[1].peer))
        gradients = await done.backward(grad)
        assert_same(done.output, gradients, Reference(decoder, inputs, grad, what, rows))
        assert done.failovers == 1


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("when", ["forward", "between", "backward"])
async def test_a_hop_that_dies_is_replaced_and_only_its_part_is_done_again(
    open_swarm, serve_tiny, decoder, small_micro_batches, victim, when
):
    async with open_swarm() as swarm:
        hosts = [await serve_tiny(swarm, span) for span in CUT]
        twin = await serve_tiny(swarm, CUT[victim])
        twin.online = False
        client = await swarm.client()
        maker = maker_of(client)
        what = trained()
        deaths = []

        async def kill_after(batches):
            """The victim dies while it works, its twin is known from then on."""
            before = len(deaths)
            task = hosts[victim].task
            original = task.device.run_batch

            async def dying(run, argument):
                if len(deaths) - before < batches:
                    deaths.append(trio.current_time())
                    return await original(run, argument)
                twin.online = True
                swarm.kill(hosts[victim])
                await trio.sleep_forever()

            task.device.run_batch = dying

        if when == "forward":
            await kill_after(2)
        done = await maker.forward(INPUT, ROWS, BLOCKS, what, patience=SHORT)
        if when == "between":
            twin.online = True
            swarm.kill(hosts[victim])
        elif when == "backward":
            await kill_after(2)
        gradients = await done.backward(GRAD)
        assert_same(done.output, gradients, Reference(decoder, INPUT, GRAD, what))
        assert done.failovers == 1
        assert client.finder.failures == [hosts[victim].peer_id]


async def replaced(swarm, serve_tiny, victims):
    """The hosts of a chain, and for each victim a twin that is not announced yet."""
    hosts = [await serve_tiny(swarm, span) for span in CUT]
    twins = [await serve_tiny(swarm, CUT[victim]) for victim in victims]
    for twin in twins:
        twin.online = False
    return hosts, twins


def strike(host, how) -> None:
    """Do `how` to a host in the middle of the next thing that its device does."""

    async def struck(run, argument):
        how(host)
        await trio.sleep_forever()

    host.task.device.run_batch = struck


@pytest.mark.parametrize("victims", [(0, 1), (0, 1, 2)])
@pytest.mark.parametrize("when", ["between", "backward"])
async def test_several_hops_that_die_at_once_are_replaced(
    open_swarm, serve_tiny, decoder, small_micro_batches, victims, when
):
    async with open_swarm() as swarm:
        hosts, twins = await replaced(swarm, serve_tiny, victims)
        client = await swarm.client()
        what = trained()
        done = await maker_of(client).forward(INPUT, ROWS, BLOCKS, what, patience=SHORT)

        def die(_host) -> None:
            for victim, twin in zip(victims, twins, strict=True):
                twin.online = True
                swarm.kill(hosts[victim])

        if when == "between":
            die(None)
        else:
            strike(hosts[victims[-1]], die)
        assert_same(done.output, await done.backward(GRAD), Reference(decoder, INPUT, GRAD, what))
        assert {hosts[victim].peer_id for victim in victims} == set(client.finder.failures)


async def test_a_replacement_that_dies_in_the_backward_is_replaced_in_turn(
    open_swarm, serve_tiny, decoder, small_micro_batches
):
    async with open_swarm() as swarm:
        hosts, (first, second) = await replaced(swarm, serve_tiny, (1, 1))
        client = await swarm.client()
        what = trained()
        done = await maker_of(client).forward(INPUT, ROWS, BLOCKS, what, patience=SHORT)
        strike(first, lambda host: (setattr(second, "online", True), swarm.kill(host)))
        strike(hosts[1], lambda host: (setattr(first, "online", True), swarm.kill(host)))
        assert_same(done.output, await done.backward(GRAD), Reference(decoder, INPUT, GRAD, what))
        assert client.finder.failures == [hosts[1].peer_id, first.peer_id]
        assert hosts[0].peer_id in {hop.peer for hop in done.chain}


async def test_a_hop_that_stops_in_the_backward_is_replaced_in_seconds(
    open_swarm, serve_tiny, decoder, small_micro_batches
):
    async with open_swarm() as swarm:
        hosts, (twin,) = await replaced(swarm, serve_tiny, (1,))
        client = await swarm.client()
        what = trained()
        done = await maker_of(client).forward(INPUT, ROWS, BLOCKS, what, patience=SHORT)
        strike(hosts[1], lambda host: (setattr(twin, "online", True), swarm.network.stop(host.ip)))
        before = trio.current_time()
        assert_same(done.output, await done.backward(GRAD), Reference(decoder, INPUT, GRAD, what))
        assert trio.current_time() - before < 20


async def test_a_hop_that_dies_may_be_replaced_by_two(open_swarm, serve_tiny, decoder):
    async with open_swarm() as swarm:
        whole = await serve_tiny(swarm, BLOCKS)
        halves = [await serve_tiny(swarm, span) for span in (Span(0, 5), Span(5, 8))]
        for half in halves:
            half.online = False
        maker = maker_of(await swarm.client())
        done = await maker.forward(INPUT, ROWS, BLOCKS, trained())
        assert len(done.chain) == 1
        for half in halves:
            half.online = True
        swarm.kill(whole)
        gradients = await done.backward(GRAD)
        assert_same(done.output, gradients, Reference(decoder, INPUT, GRAD, trained()))


async def test_a_span_that_leaves_its_peer_ends_its_lanes_and_the_pass_goes_on_elsewhere(
    open_swarm, serve_tiny, decoder
):
    async with open_swarm() as swarm:
        leaving = await serve_tiny(swarm, BLOCKS)
        maker = maker_of(await swarm.client())
        done = await maker.forward(INPUT, ROWS, BLOCKS, trained())
        twin = await serve_tiny(swarm, BLOCKS)
        leaving.online = False
        assert leaving.server.passes.lanes == 1
        with trio.fail_after(5):
            await leaving.server.withdraw(leaving.server.spans[0])
        assert leaving.server.spans == ()
        assert leaving.server.passes.held_bytes == 0
        gradients = await done.backward(GRAD)
        assert twin.server.passes.lanes == 1
        assert_same(done.output, gradients, Reference(decoder, INPUT, GRAD, trained()))


async def test_blocks_that_nobody_serves_any_more_are_named(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        hosts = [await serve_tiny(swarm, span) for span in CUT]
        maker = maker_of(await swarm.client())
        done = await maker.forward(INPUT, ROWS, BLOCKS, Trained(), patience=SHORT)
        swarm.kill(hosts[1])
        began = trio.current_time()
        with pytest.raises(NoChain, match="3:7"):
            await done.backward(GRAD)
        assert trio.current_time() - began < 2 * SHORT.missing_s + 1


async def test_without_room_for_tapes_the_results_are_the_same(open_swarm, serve_tiny, decoder):
    async with open_swarm() as swarm:
        for span in CUT:
            host = await serve_tiny(swarm, span)
            host.task.engine.passes.memory.take("others", 2**40)
        maker = maker_of(await swarm.client())
        done = await maker.forward(INPUT, ROWS, BLOCKS, trained())
        gradients = await done.backward(GRAD)
        assert_same(done.output, gradients, Reference(decoder, INPUT, GRAD, trained()))


async def test_what_a_lane_held_is_given_back_when_its_pass_ends_however_it_ends(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        host = await serve_tiny(swarm, BLOCKS)
        client = await swarm.client()
        maker = maker_of(client)
        memory, server = host.task.engine.passes.memory, host.server.passes
        idle = memory.free_bytes

        async def settled():
            await trio.sleep(1)
            return memory.free_bytes == idle and not server.lanes and not server.held_bytes

        done = await maker.forward(INPUT, ROWS, BLOCKS, trained())
        assert memory.free_bytes < idle
        await done.backward(GRAD)
        assert await settled()
        with await maker.forward(INPUT, ROWS, BLOCKS, trained()):
            assert not await settled()
        assert await settled()
        done = await maker.forward(INPUT, ROWS, BLOCKS, trained(), keep=False)
        assert await settled()
        with trio.move_on_after(0.03) as scope:
            await maker.forward(INPUT, ROWS, BLOCKS, trained())
        assert scope.cancelled_caught
        assert await settled()
        done = await maker.forward(INPUT, ROWS, BLOCKS, trained())
        with trio.move_on_after(0.015):
            await done.backward(GRAD)
        assert await settled()
        swarm.vanish(client)
        await trio.sleep(60)
        assert await settled()


async def test_a_cancelled_pass_frees_the_device_for_the_next(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        await serve_tiny(swarm, BLOCKS, step_s=1.0)
        first, second = maker_of(await swarm.client()), maker_of(await swarm.client())
        with trio.move_on_after(2.5):
            await first.forward(INPUT, ROWS, BLOCKS, trained())
        began = trio.current_time()
        await second.forward(INPUT[:20], (20,), BLOCKS, Trained())
        assert trio.current_time() - began < 8 * 1.0 + 3


async def test_a_lane_idle_for_long_is_forgotten_and_its_backward_is_done_from_the_input(
    open_swarm, serve_tiny, decoder
):
    async with open_swarm() as swarm:
        host = await serve_tiny(swarm, BLOCKS)
        maker = maker_of(await swarm.client())
        done = await maker.forward(INPUT, ROWS, BLOCKS, trained())
        await trio.sleep(400)
        assert host.server.passes.lanes == 0
        gradients = await done.backward(GRAD)
        assert_same(done.output, gradients, Reference(decoder, INPUT, GRAD, trained()))


async def test_a_row_that_no_peer_has_memory_for_is_refused_with_the_numbers(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        await serve_tiny(swarm, BLOCKS, pass_bytes=2**16)
        client = await swarm.client()
        maker = maker_of(client)
        with pytest.raises(NoRoom, match=r"a row of 24 positions takes [0-9]+ bytes .* 21845 are set aside"):
            await maker.forward(INPUT, ROWS, BLOCKS, Trained(), patience=SHORT)
        assert client.finder.failures == []


async def test_a_peer_with_memory_is_found_after_one_without(open_swarm, serve_tiny, decoder):
    async with open_swarm() as swarm:
        await serve_tiny(swarm, BLOCKS, pass_bytes=2**16)
        large = await serve_tiny(swarm, BLOCKS)
        client = await swarm.client()
        maker = maker_of(client)
        failovers = 0
        for _ in range(4):
            done = await maker.forward(INPUT, ROWS, BLOCKS, Trained())
            gradients = await done.backward(GRAD)
            assert_same(done.output, gradients, Reference(decoder, INPUT, GRAD, Trained()))
            assert done.chain[0].peer == str(large.peer_id)
            failovers += done.failovers
        # Near-best chains are chosen at random: the small peer was asked at least once.
        assert failovers > 0
        assert client.finder.failures == []


async def test_a_peer_that_does_not_train_is_passed_over_without_blame(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        await swarm.serve(0, 8)
        client = await swarm.client()
        with pytest.raises(NoChain):
            await maker_of(client).forward(INPUT, ROWS, BLOCKS, Trained(), patience=SHORT)
        able = await serve_tiny(swarm, BLOCKS)
        done = await maker_of(client).forward(INPUT, ROWS, BLOCKS, Trained(), patience=SHORT)
        assert done.chain[0].peer == str(able.peer_id)
        assert client.finder.failures == []


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ((24, 7, 24, 21), Trained()),
        ((75, 0), Trained()),
        (ROWS, Trained(normal(7, 1, 3, WIDTH))),
        (ROWS, Trained(normal(8, 2, 3, WIDTH))),
        (ROWS, Trained(normal(8, 1, 8, WIDTH))),
        (ROWS, Trained(lora={(9, "self_attn.q_proj"): (normal(2, WIDTH), normal(WIDTH, 2))})),
        (ROWS, Trained(lora={(0, "self_attn.other"): (normal(2, WIDTH), normal(WIDTH, 2))})),
        (ROWS, Trained(lora={(0, "self_attn.q_proj"): (normal(2, WIDTH + 1), normal(WIDTH, 2))})),
        (ROWS, Trained(prefixes={9: (normal(3, WIDTH), normal(3, WIDTH))})),
        (ROWS, Trained(prefixes={0: (normal(8, WIDTH), normal(8, WIDTH))})),
        (ROWS, Trained(prefixes={0: (normal(3, WIDTH + 1), normal(3, WIDTH))})),
    ],
)
async def test_what_does_not_fit_is_the_callers_fault(open_swarm, serve_tiny, rows, what):
    async with open_swarm() as swarm:
        await serve_tiny(swarm, BLOCKS)
        client = await swarm.client()
        with pytest.raises(InvalidRequest):
            await maker_of(client).forward(INPUT, rows, BLOCKS, what)
        assert client.finder.failures == []


async def _object(stream):
    """Refuse a lane as if the client's request were wrong."""
    await stream.receive()
    await refuse(stream, PassFailure.of, InvalidRequest("no such parameter"))


async def test_what_one_network_says_against_a_pass_is_not_believed(open_swarm, serve_tiny, decoder):
    async with open_swarm() as swarm:
        liars = [await serve_tiny(swarm, BLOCKS) for _ in range(2)]
        for liar in liars:
            liar.connections.handlers[PASS_PROTOCOL] = _object
        client = await swarm.client()
        # Two peers of different networks are believed: what they say of the request may well be true.
        with pytest.raises(InvalidRequest, match="no such parameter"):
            await maker_of(client).forward(INPUT, ROWS, BLOCKS, Trained())
        swarm.kill(liars[1])
        honest = await serve_tiny(swarm, BLOCKS)
        refused = False
        for _ in range(8):
            done = await maker_of(client).forward(INPUT, ROWS, BLOCKS, Trained())
            assert done.chain[0].peer == str(honest.peer_id)
            gradients = await done.backward(GRAD)
            assert_same(done.output, gradients, Reference(decoder, INPUT, GRAD, Trained()))
            refused |= done.failovers > 0
            if refused:
                break
        # Chains are chosen at random: once the liar was asked, it was found out.
        assert refused
        assert client.finder.failures.count(liars[0].peer_id) == 1
        assert honest.peer_id not in client.finder.failures


@pytest.mark.parametrize("twins", [1, 2])
async def test_a_backward_that_overflows_ends_with_one_error(open_swarm, serve_tiny, twins):
    async with open_swarm() as swarm:
        for span in CUT:
            for _ in range(twins):
                await serve_tiny(swarm, span, dtype=torch.float16)
        client = await swarm.client()
        # Where a norm's input is 0, its gradient is a thousand times what comes back to it.
        done = await maker_of(client).forward(torch.zeros_like(INPUT), ROWS, BLOCKS, Trained())
        before = trio.current_time()
        with pytest.raises(BadResult, match="gave NaN or infinity as a gradient in float16"):
            await done.backward(GRAD)
        assert trio.current_time() - before < 5
        assert not client.finder.failures


@pytest.mark.parametrize("twins", [1, 2])
async def test_a_forward_that_overflows_ends_with_one_error(open_swarm, serve_tiny, twins):
    async with open_swarm() as swarm:
        for _ in range(twins):
            await serve_tiny(swarm, BLOCKS, dtype=torch.float16, overflows=True)
        client = await swarm.client()
        before = trio.current_time()
        with pytest.raises(BadResult, match=r"blocks 0:8 gave NaN or infinity in float16: .*--dtype bfloat16"):
            await maker_of(client).forward(INPUT, ROWS, BLOCKS, Trained())
        assert trio.current_time() - before < 5
        assert not client.finder.failures


@pytest.mark.parametrize("power", [-100, -30, 0, 30, 100])
async def test_gradients_of_any_size_come_back_as_exact_as_those_of_size_one(open_swarm, serve_tiny, power):
    """float16 servers hold nothing below 6e-8 or above 65504."""
    async with open_swarm() as swarm:
        await serve_tiny(swarm, BLOCKS, dtype=torch.float16)
        maker, what = maker_of(await swarm.client()), trained()
        found = []
        for grad in (GRAD, GRAD * 2.0**power):
            done = await maker.forward(INPUT, ROWS, BLOCKS, what)
            found.append(await done.backward(grad))
        one, other = found
        assert torch.equal(other.hidden, one.hidden * 2.0**power)
        assert torch.equal(other.prompts, one.prompts * 2.0**power)
        for key, pair in one.lora.items():
            assert all(torch.equal(a, b * 2.0**power) for a, b in zip(other.lora[key], pair, strict=True))


async def test_gradients_that_float32_cannot_hold_are_one_error(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        await serve_tiny(swarm, BLOCKS)
        done = await maker_of(await swarm.client()).forward(INPUT, ROWS, BLOCKS, trained())
        with pytest.raises(BadResult, match="larger than float32 can hold"):
            await done.backward(GRAD * 8e37)


async def test_what_is_trained_must_be_finite_and_is_named(open_swarm, serve_tiny):
    async with open_swarm() as swarm:
        await serve_tiny(swarm, BLOCKS)
        client = await swarm.client()
        good = trained()
        prompts = good.prompts.clone()
        prompts[3, 0, 1, 5] = torch.nan
        lora = dict(good.lora)
        lora[4, "self_attn.q_proj"] = (lora[4, "self_attn.q_proj"][0], lora[4, "self_attn.q_proj"][1] * torch.inf)
        for what, reason in (
            (Trained(prompts, {}), "the prompts have values that are not finite"),
            (Trained(None, lora), r"the LoRA pair for self_attn\.q_proj of block 4 has values that are not finite"),
            (
                Trained(prefixes={3: (normal(3, WIDTH), normal(3, WIDTH) * torch.nan)}),
                "the prefix of block 3 has values that are not finite",
            ),
        ):
            with pytest.raises(InvalidRequest, match=reason):
                await maker_of(client).forward(INPUT, ROWS, BLOCKS, what)
        assert not client.finder.failures
