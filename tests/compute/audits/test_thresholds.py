from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from peerd.compute.audits import calibrate
from peerd.compute.audits.calibrate import CLASSES, LLAMACPP_CLASS, PACKED_CLASSES, classes_of
from peerd.compute.audits.thresholds import Numerics, Thresholds, own_thresholds
from peerd.compute.checkpoint.opening import open_checkpoint
from tests.compute.gguf_models import tiny_config, tiny_model
from tests.compute.gguf_writer import write_model

FULL, HALF, INT8, NF4 = (
    Numerics("float32", "none"),
    Numerics("bfloat16", "none"),
    Numerics("bfloat16", "int8"),
    Numerics("bfloat16", "nf4"),
)
ALL = (*CLASSES, *PACKED_CLASSES, LLAMACPP_CLASS)
TABLE = Thresholds(
    {
        frozenset({str(FULL)}): 0.001,
        frozenset({str(FULL), str(HALF)}): 0.05,
        frozenset({str(HALF)}): 0.04,
        frozenset({str(HALF), str(NF4)}): 0.4,
    },
    {frozenset({str(FULL)}): 0.002},
    {"model": "tiny"},
)


def test_the_worst_pair_of_two_chains_decides() -> None:
    assert TABLE.limit([(FULL, FULL)], is_whole=True) == 0.001
    assert TABLE.limit([(FULL, FULL), (HALF, FULL), (HALF, HALF)], is_whole=True) == 0.05
    assert TABLE.limit([(FULL, FULL)], is_whole=False) == 0.002


def test_without_a_measurement_there_is_no_limit() -> None:
    assert TABLE.limit([(FULL, FULL), (FULL, INT8)], is_whole=True) is None
    assert TABLE.limit([(HALF, HALF)], is_whole=False) is None
    assert TABLE.limit([(FULL, Numerics("float32", "q5_k"))], is_whole=True) is None


def test_float16_counts_as_bfloat16_which_rounds_more() -> None:
    assert TABLE.limit([(Numerics("float16", "none"), FULL)], is_whole=True) == 0.05


def test_a_device_has_its_own_row_or_that_of_all_devices() -> None:
    gpu = Numerics("bfloat16", "none", "cuda")
    assert TABLE.limit([(gpu, FULL)], is_whole=True) == 0.05
    measured = Thresholds(TABLE.whole | {frozenset({str(gpu), str(FULL)}): 0.07}, TABLE.part, {})
    assert measured.limit([(gpu, FULL)], is_whole=True) == 0.07


def test_limits_grow_with_blocks_beyond_those_that_were_measured() -> None:
    table = Thresholds(TABLE.whole, TABLE.part, {"spans": ["0:4", "4:12"]})
    limits = [table.limit([(FULL, FULL)], is_whole=True, blocks=blocks) for blocks in (0, 3, 12, 24, 120)]
    assert limits == pytest.approx([0.001, 0.001, 0.001, 0.002, 0.01])
    assert table.limit([(FULL, FULL)], is_whole=False, blocks=16) == pytest.approx(0.004)
    assert TABLE.limit([(FULL, FULL)], is_whole=True, blocks=200) == 0.001


def test_a_table_reads_what_it_wrote() -> None:
    assert Thresholds.from_json(TABLE.to_json()) == TABLE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"peerd_thresholds": 2}',
        '{"peerd_thresholds": 1, "whole": 3}',
        '{"peerd_thresholds": 1, "whole": {}, "part": {}, "made": 5}',
        '{"peerd_thresholds": 1, "whole": {}, "part": {}, "made": {"spans": ["4:3"]}}',
    ],
)
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Thresholds.from_json(text)


@pytest.mark.parametrize("one", ALL, ids=str)
@pytest.mark.parametrize("other", ALL, ids=str)
@pytest.mark.parametrize("is_whole", [True, False])
def test_our_own_table_has_every_pair_and_tells_a_skipped_block_from_rounding(
    one: Numerics, other: Numerics, is_whole: bool
) -> None:
    limit = own_thresholds().limit([(one, other)], is_whole=is_whole)
    assert limit is not None
    # All find a server that returns its input; those that round less than nf4 does find a skipped block of ten.
    assert 0 < limit < 0.9
    if "nf4" not in (one.quantization, other.quantization) or one.quantization == other.quantization:
        assert limit < 0.15


def test_a_quantized_file_is_served_in_more_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "is_usable", lambda: False)
    for name, kind in (("plain", Type.F16), ("packed", Type.Q4_0)):
        write_model(tmp_path / f"{name}.gguf", "llama", tiny_model(tiny_config("llama")), kind)
    with open_checkpoint(tmp_path / "plain.gguf") as plain, open_checkpoint(tmp_path / "packed.gguf") as packed:
        assert classes_of(plain) == CLASSES
        assert classes_of(packed) == (*CLASSES, *PACKED_CLASSES)
        monkeypatch.setattr(calibrate, "is_usable", lambda: True)
        assert classes_of(packed) == ALL
