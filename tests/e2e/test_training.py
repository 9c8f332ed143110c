"""Training through a swarm of the real model, on real sockets, beside autograd on the same blocks."""

from __future__ import annotations

import pytest
import torch

from peerd.protocol.span import Span

pytestmark = [pytest.mark.real_time, pytest.mark.model]

PROMPT_POSITIONS = 4
# Over the border between the two servers.
BLOCKS = Span(13, 17)
ROWS, POSITIONS = 2, 12
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def run_blocks(decoder, hidden, prompts):
    """Transformers' own blocks, one after the other."""
    positions = torch.arange(POSITIONS).expand(ROWS, -1)
    embeddings = decoder.rotary_emb(hidden, positions)
    filled = torch.zeros(ROWS, POSITIONS - PROMPT_POSITIONS, hidden.shape[-1])
    for layer, prompt in zip(decoder.layers[BLOCKS.start : BLOCKS.end], prompts, strict=True):
        prompted = hidden + torch.cat((prompt.expand(ROWS, -1, -1), filled), 1)
        hidden = layer(prompted, attention_mask=None, position_ids=positions, position_embeddings=embeddings)
    return hidden


async def test_a_forward_and_its_backward_equal_transformers(open_local_swarm, reference):
    decoder = reference.model.model
    width = decoder.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, POSITIONS, width, generator=generator)
    prompts = torch.randn(len(BLOCKS), 1, PROMPT_POSITIONS, width, generator=generator)
    grad = torch.randn(ROWS, POSITIONS, width, generator=generator)
    async with open_local_swarm(2) as swarm, swarm.client() as model:
        done = await model.forward(hidden, prompts=prompts, blocks=BLOCKS)
        hops = [(hop.span.start, hop.span.end) for hop in done.chain]
        gradients = await done.backward(grad)
        ids = await model.forward([[5, 6, 7], [8, 9]], keep=False)
    assert hops == [(13, 15), (15, 17)]
    leaves = hidden.clone().requires_grad_(), prompts.clone().requires_grad_()
    output = run_blocks(decoder, *leaves)
    output.backward(grad)
    torch.testing.assert_close(done.output, output.detach(), **TOLERANCE)
    for found, leaf in zip((gradients.hidden, gradients.prompts), leaves, strict=True):
        # Of the largest value: gradients are sums of many terms of that size, which nearly cancel.
        size = float(leaf.grad.abs().max())
        torch.testing.assert_close(found / size, leaf.grad / size, **TOLERANCE)
    normed = torch.cat([reference.hidden_states(row)[-1] for row in ([5, 6, 7], [8, 9])])
    torch.testing.assert_close(decoder.norm(ids.output).detach(), normed, **TOLERANCE)
