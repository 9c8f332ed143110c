"""An adapter that says which model it was trained for is told apart from those of other models of the same shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from peerd.compute.adapters.base import TrainedFor, trained_for

OURS, OTHER = "ab" * 32, "cd" * 32


@pytest.mark.parametrize(
    ("config", "metadata", "digest"),
    [
        ({}, {}, ""),
        ({}, {"model_digest": OURS}, OURS),
        ({"auto_mapping": {"peerd_model_digest": OURS}}, {"format": "pt"}, OURS),
        # The weights file's word is the one that was written with the weights.
        ({"auto_mapping": {"peerd_model_digest": OTHER}}, {"model_digest": OURS}, OURS),
        ({"auto_mapping": {"peerd_model_digest": OURS}}, {"model_digest": "no digest"}, OURS),
        ({"auto_mapping": {"peerd_model_digest": 7}}, {}, ""),
        ({"auto_mapping": "transformers"}, {}, ""),
        ({"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}}, {}, ""),
    ],
    ids=str,
)
def test_the_digest_stands_in_the_weights_file_or_in_pefts_configuration(
    config: Mapping[str, Any], metadata: Mapping[str, str], digest: str
) -> None:
    assert trained_for(config, metadata) == TrainedFor("", digest)


def test_names_of_other_types_say_nothing_and_long_ones_are_cut() -> None:
    assert trained_for({"base_model_name_or_path": ["org/name"]}, {}).name == ""
    assert len(trained_for({"base_model_name_or_path": "n" * 10**6}, {}).name) == 200


def test_only_a_digest_that_differs_is_a_mismatch() -> None:
    assert TrainedFor("org/name", OURS).mismatch(OURS) is None
    assert TrainedFor("org/name", "").mismatch(OURS) is None
    assert TrainedFor("org/other", OTHER).mismatch(OURS) == (
        "was trained for another model, org/other (digest cdcdcdcdcdcdcdcd, this one has abababababababab)"
    )
    assert "of an unknown name" in str(TrainedFor("", OTHER).mismatch(OURS))
