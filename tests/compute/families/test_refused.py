"""Causal language models of Transformers are supported, refused with the reason, or listed as new."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peerd.compute.errors import UnsupportedModelError
from peerd.compute.families.family import Family
from peerd.compute.families.layer_kinds import layer_kinds
from peerd.compute.families.lookup import FAMILIES, family_named
from peerd.compute.families.refused import NOT_SERVED, REFUSED
from peerd.compute.families.survey import unknown_architectures
from peerd.compute.transformers_compat import before_newest_tested


@pytest.mark.parametrize("text_model", sorted(REFUSED))
def test_a_refused_family_is_refused_with_the_reason(text_model: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"cannot be cut into spans: [a-z].{25,}"):
        family_named(text_model)


def test_an_architecture_that_a_release_adds_is_listed_as_new(monkeypatch: pytest.MonkeyPatch) -> None:
    class NewConfig(LlamaConfig):
        model_type = "llama_of_tomorrow"

    known = unknown_architectures()
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "llama_of_tomorrow", "LlamaOfTomorrow")
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "llama_of_tomorrow", NewConfig)
    assert unknown_architectures() == sorted([*known, "llama_of_tomorrow"])
    with pytest.raises(UnsupportedModelError, match="'llama_of_tomorrow' is not one of those supported"):
        family_named("llama_of_tomorrow")


def test_nothing_is_both_supported_and_refused() -> None:
    assert not REFUSED.keys() & FAMILIES.keys()


def test_only_causal_models_of_transformers_are_refused_by_name() -> None:
    """A name that Transformers does not know would never be met: it is misspelt, or newer than this release."""
    if before_newest_tested():
        pytest.skip("this release of Transformers is older than the newest that REFUSED was written for")
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= REFUSED.keys()


def test_another_architecture_is_answered_with_what_is_supported() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"'t5' is not one of those supported; `peerd models --families` lists"
    ):
        family_named("t5")
    with pytest.raises(UnsupportedModelError, match=r"'mixtrall' is not .* \(mixtral.* are called nearly so\)"):
        family_named("mixtrall")
    with pytest.raises(UnsupportedModelError, match=r"architecture None is not one of those supported"):
        family_named(None)


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
def test_what_people_ask_for_beside_causal_models_is_answered_with_the_reason(name: str) -> None:
    assert name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "then it belongs to REFUSED"
    assert name not in FAMILIES
    with pytest.raises(UnsupportedModelError, match=rf"{name} is not served: its [a-z].{{25,}}"):
        family_named(name)


@pytest.mark.parametrize("layer_type", ["linear_attention", "hybrid"])
def test_a_running_state_that_a_family_is_not_known_to_have_is_refused(layer_type: str) -> None:
    config: Any = SimpleNamespace(model_type="llama", layer_types=["full_attention", layer_type])
    with pytest.raises(UnsupportedModelError, match=f"{layer_type} keeps a running state"):
        layer_kinds(config)


def test_a_family_that_the_installed_transformers_does_not_have_yet_is_refused() -> None:
    family = Family("llama9", "Llama9")
    with pytest.raises(UnsupportedModelError, match=r"llama9 needs a newer Transformers: it has no .*\.Llama9Config"):
        family.config_type()
    renamed = Family("llama", "Llama9")
    with pytest.raises(UnsupportedModelError, match=r"has no .*\.Llama9ForCausalLM"):
        renamed.causal_type()
