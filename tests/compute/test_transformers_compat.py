"""How peerd uses the installed Transformers, and its errors if a release behaves differently."""

from __future__ import annotations

import tomllib
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from peerd.compute import transformers_compat as compat
from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.tiny_families import tiny_model

ROOT = Path(__file__).parents[2]


def test_the_cache_is_asked_for_by_the_name_that_a_forward_has() -> None:
    def old(hidden: Any, past_key_values: Any = None, **_: Any) -> None: ...
    def new(hidden: Any, cache: Any = None, **_: Any) -> None: ...
    def neither(hidden: Any, **_: Any) -> None: ...

    assert compat.cache_argument(old) == "past_key_values"
    assert compat.cache_argument(new) == "cache"
    with pytest.raises(TypeError, match="takes no KV cache"):
        compat.cache_argument(neither)


def test_a_block_may_pass_the_cache_under_any_of_its_names_and_nothing_else() -> None:
    cache = object()
    assert compat.take_cache({"cache": cache}) is compat.take_cache({"past_key_values": cache}) is cache
    assert compat.take_cache({}) is None
    with pytest.raises(TypeError, match="passes kv, which peerd does not know"):
        compat.take_cache({"kv": cache})


@pytest.mark.parametrize("name", ["mpt", "gptj", "codegen", "bloom", "llama"])
def test_a_forward_with_a_cache_causes_no_warning(name: str, tmp_path: Path) -> None:
    tiny_model(FAMILIES[name]).save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        span = load_span(checkpoint, Span(0, 2), attention="eager" if name == "llama" else register_attention())
    if name != "llama":
        # Attention of ours reads a batch's own cache; without a batch it is as if nothing was cached.
        from peerd.compute.engine.engine import Engine

        Engine(span, kv_tokens=64)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        span(torch.zeros(1, 3, span.hidden_size), torch.arange(3)[None], _Counts(), rope_lengths=3)
    assert [str(warning.message) for warning in caught] == []


class _Counts:
    """A cache that keeps nothing."""

    is_compileable = False
    is_sliding = (False,)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, kwargs: object = None) -> Any:
        return keys, values

    def get_seq_length(self, _layer: int = 0) -> int:
        return 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, length: int, _layer: int) -> tuple[int, int]:
        return length, 0


@pytest.mark.parametrize(
    ("release", "warned"),
    [
        (compat.OLDEST_TESTED + ".0", False),
        (compat.NEWEST_TESTED + ".7", False),
        ("5.17.3", True),
        ("5.99.0", True),
    ],
)
def test_a_release_that_was_not_tested_is_named_in_one_line(
    release: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "version", lambda _: release)
    line = compat.untested_release()
    assert (line is not None) == warned
    if line is not None:
        assert "\n" not in line
        assert f"Transformers {release} " in line
        assert f"{compat.OLDEST_TESTED} to {compat.NEWEST_TESTED}" in line


def test_the_tested_range_is_the_one_that_can_be_installed() -> None:
    """The lower bound in pyproject.toml is the oldest release that was tested, the locked one is the newest."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {Requirement(line).name: Requirement(line).specifier for line in dependencies}
    oldest = min(Version(part.version) for part in ranges["transformers"] if part.operator == ">=")
    assert oldest.release[:2] == Version(compat.OLDEST_TESTED).release
    assert Version(installed_version("transformers")) in ranges["transformers"]
