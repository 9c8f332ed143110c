"""Spellings of models on a hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.compute.checkpoint.hub.id import HubId, hub_id_of, is_commit, parse_hub_id
from peerd.compute.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("meta-llama/Llama-3.1-8B", HubId("meta-llama/Llama-3.1-8B")),
        ("org/name@main", HubId("org/name", "main")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("org/name@v1.0+cu", HubId("org/name", "v1.0+cu")),
    ],
)
def test_an_id_is_an_organisation_a_name_and_perhaps_a_revision(text: str, expected: HubId) -> None:
    assert parse_hub_id(text) == expected
    assert str(expected) == text
    assert expected.name == text.partition("@")[0].partition("/")[2]


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "a/b/c",
        "/a/b",
        "./a/b",
        "../b",
        "a/..",
        "~/b",
        "a/b.gguf",
        "a b/c",
        "a--b/c",
        "",
        "@main",
        "ä/b",
        "a/b\n",
    ],
)
def test_what_looks_like_a_path_or_nothing_is_no_id(text: str) -> None:
    assert parse_hub_id(text) is None


@pytest.mark.parametrize("revision", ["", "..", "a/../b", "-f", "a b", "a/", "x" * 300, "a\n"])
def test_a_malformed_revision_is_named(revision: str) -> None:
    with pytest.raises(CheckpointError, match="no revision of org/name"):
        parse_hub_id(f"org/name@{revision}")
    with pytest.raises(CheckpointError, match="no revision of org/name"):
        parse_hub_id("org/name", revision)


def test_a_revision_beside_the_id_is_as_good_but_must_be_the_same() -> None:
    assert parse_hub_id("org/name", "v1") == parse_hub_id("org/name@v1", "v1") == HubId("org/name", "v1")
    with pytest.raises(CheckpointError, match="say one of them"):
        parse_hub_id("org/name@v1", "v2")


def test_what_is_on_this_machine_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id_of("org/name") == HubId("org/name")
    assert hub_id_of(Path("org/name")) is None
    Path("org/name").mkdir(parents=True)
    assert hub_id_of("org/name") is None


def test_only_whole_hashes_are_commits() -> None:
    assert is_commit("0123456789abcdef" * 2 + "01234567")
    assert not any(map(is_commit, ("main", "0123456", "0" * 39, "0" * 41, "G" * 40, "")))


@given(st.text(alphabet="ab./@-_~ \\\0\n", max_size=24))
def test_whatever_is_accepted_is_safe_as_the_name_of_files(text: str) -> None:
    try:
        found = parse_hub_id(text)
    except CheckpointError:
        return
    if found is not None:
        parts = [*found.repo.split("/"), *(found.revision or "main").split("/")]
        assert not {"..", "~", "\0", "\n"} & {part for part in parts}
        assert not any(char in part for part in parts for char in "\0\n\\ ")
        assert not (found.revision or "main").startswith("/")
