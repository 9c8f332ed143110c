"""Every causal language model of Transformers is supported, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peerd.compute.errors import UnsupportedModel
from peerd.compute.families.family import Family
from peerd.compute.families.layer_kinds import layer_kinds
from peerd.compute.families.lookup import FAMILIES, family_named
from peerd.compute.families.refused import REFUSED


def text_model_of(name: str) -> str:
    """What a published configuration of this kind calls its language model."""
    kind: Any = CONFIG_MAPPING[name]
    if kind.model_type in FAMILIES or kind.model_type in REFUSED:
        return str(kind.model_type)
    return str(kind().get_text_config().model_type)


@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_causal_model_is_supported_or_refused_with_the_reason(name: str) -> None:
    text_model = text_model_of(name)
    if text_model not in FAMILIES:
        with pytest.raises(UnsupportedModel, match=r"cannot be cut into spans: [a-z].{25,}"):
            family_named(text_model)


def test_nothing_is_both_supported_and_refused() -> None:
    assert not REFUSED.keys() & FAMILIES.keys()


def test_only_causal_models_of_transformers_are_refused_by_name() -> None:
    """A name that Transformers does not know would never be met: it is misspelt."""
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= REFUSED.keys()


def test_another_architecture_is_answered_with_what_is_supported() -> None:
    with pytest.raises(UnsupportedModel, match=r"'t5' is not one of those supported: .*llama"):
        family_named("t5")


def test_blocks_that_keep_a_running_state_are_refused_where_only_some_models_of_a_family_have_them() -> None:
    from transformers import GraniteMoeHybridConfig

    types = ["full_attention", "linear_attention"]
    config = GraniteMoeHybridConfig(num_hidden_layers=2, layer_types=types)
    with pytest.raises(UnsupportedModel, match="linear_attention keeps a running state"):
        layer_kinds(config)


def test_a_family_that_the_installed_transformers_does_not_have_yet_is_refused() -> None:
    family = Family("llama9", "Llama9")
    with pytest.raises(UnsupportedModel, match=r"llama9 needs a newer Transformers: it has no .*\.Llama9Config"):
        family.config_type()
    renamed = Family("llama", "Llama9")
    with pytest.raises(UnsupportedModel, match=r"has no .*\.Llama9ForCausalLM"):
        renamed.causal_type()
