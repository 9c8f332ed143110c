"""A short run of `make fuzz`."""

from __future__ import annotations

import subprocess
import sys
from random import Random

import pytest

from tests.fuzz.decoders import Decoder, Found, decoders, fuzz

INPUTS = 300


@pytest.mark.parametrize("decoder", decoders(), ids=lambda decoder: decoder.name)
def test_broken_input_is_refused_with_the_error_that_callers_know(decoder: Decoder) -> None:
    fuzz(decoder, INPUTS, Random(1))


@pytest.mark.parametrize("decoder", decoders(), ids=lambda decoder: decoder.name)
def test_some_of_its_seeds_are_understood(decoder: Decoder) -> None:
    def is_understood(data: bytes) -> bool:
        try:
            decoder.decode(data)
        except decoder.errors:
            return False
        return True

    assert any(map(is_understood, decoder.seeds))


def test_a_decoder_that_lets_another_error_out_is_found() -> None:
    def decode(data: bytes) -> None:
        if len(data) % 7 == 3:
            raise IndexError

    with pytest.raises(Found, match="broken raised IndexError"):
        fuzz(Decoder("broken", decode, (bytes(16),)), INPUTS, Random(1))


@pytest.mark.processes
def test_coverage_guides_input_where_atheris_is_installed() -> None:
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "tests.fuzz.guided", "frames", "--runs", "200"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
