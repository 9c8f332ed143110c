"""Staging on the CPU, where all copies are plain: what test_cuda repeats on a GPU."""

from __future__ import annotations

import torch

from peerd.compute.device.staging import Staging, upload

WIDTH = 8
CPU = torch.device("cpu")


def make() -> Staging:
    return Staging(WIDTH, device=CPU, dtype=torch.float32)


def test_parts_come_one_after_the_other_in_the_devices_dtype():
    parts = [torch.randn(2, WIDTH, dtype=torch.float16), torch.randn(1, WIDTH, dtype=torch.bfloat16)]
    gathered = make().gather(parts)
    assert gathered.dtype == torch.float32
    torch.testing.assert_close(gathered, torch.cat([part.float() for part in parts]))


def test_room_behind_the_parts_is_zero_whatever_was_there_before():
    staging = make()
    staging.gather([torch.full((4, WIDTH), torch.nan)], room=4)
    gathered = staging.gather([torch.ones(1, WIDTH)], room=4)
    assert gathered.shape == (4, WIDTH)
    assert not gathered[1:].any()


def test_what_is_sent_lands_in_the_target():
    target = torch.zeros(2, WIDTH)
    hidden = torch.randn(2, WIDTH)
    assert make().send(hidden, target) is target
    torch.testing.assert_close(target, hidden)


def test_each_position_is_told_to_be_finite_or_not():
    hidden = torch.ones(3, WIDTH)
    hidden[0, 2], hidden[2, 0] = torch.nan, -torch.inf
    _, finite = make().fetch(hidden)
    assert finite.tolist() == [False, True, False]


def test_numbers_are_uploaded_as_they_are():
    assert upload([5, 7], CPU).tolist() == [5, 7]
    assert upload([], CPU).shape == (0,)
