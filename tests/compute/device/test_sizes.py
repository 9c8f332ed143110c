from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.compute.device.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("8 GiB", 8 * 2**30),
        ("8g", 8 * 2**30),
        ("8G", 8 * 2**30),
        ("8Gi", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("500MB", 500_000_000),
        ("500mib", 500 * 2**20),
        ("1.5g", 3 * 2**29),
        ("0.5KiB", 512),
        ("1.9B", 1),
        ("64k", 65536),
        ("2TB", 2 * 10**12),
        ("1PiB", 2**50),
        ("12345", 12345),
        (" 7B ", 7),
    ],
)
def test_a_size_is_read_as_it_is_written(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "1.G", ".5G", "1e9", "1,5G", "8GiBs", "8 G B", "1_000", "nan", "٣G", "0x10"]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="such as 8GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0GiB", "0.1B", "8192PiB", "9" * 30])
def test_a_size_of_nothing_or_beyond_all_memory_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1 MiB"),
        (8 * 2**30, "8 GiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**60, "1024 PiB"),
    ],
)
def test_a_size_is_shown_in_its_largest_unit(size: int, text: str) -> None:
    assert format_size(size) == text


@settings(derandomize=True)
@given(st.integers(1, 2**60))
def test_what_is_shown_reads_back_within_its_rounding(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.05)
