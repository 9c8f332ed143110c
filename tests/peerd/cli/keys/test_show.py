"""`peerd keys show`: whose keys there are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from peerd.cli.commands import keys as keys_command
from peerd.cli.keys.identity_file import load_or_create_identity
from peerd.cli.main import cli


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["keys", "show", *map(str, arguments)])


def test_a_key_is_named_by_its_peer_and_its_use(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    with load_or_create_identity(path) as identity:
        assert run(path).stdout == f"{identity.peer_id}  {path}  in use\n"
    assert run(path).stdout == f"{identity.peer_id}  {path}\n"
    assert run("--json", path).exit_code == 0
    (listed,) = json.loads(run("--json", path).stdout)["keys"]
    assert listed == {"path": str(path), "peer_id": str(identity.peer_id), "in_use": False, "problem": ""}
    assert identity.seed.hex() not in run("--json", path).stdout


def test_a_file_that_is_no_key_is_named_after_the_others(tmp_path: Path) -> None:
    path, bad = tmp_path / "a.key", tmp_path / "b.key"
    bad.write_text("no key")
    with load_or_create_identity(path) as identity:
        pass
    result = run(bad, path, tmp_path / "c.key")
    assert result.stdout == f"{identity.peer_id}  {path}\n"
    assert f"{bad} holds no unencrypted Ed25519 key" in result.stderr
    assert f"{tmp_path / 'c.key'} does not exist" in result.stderr
    assert result.exit_code == 2
    assert not (tmp_path / "c.key").exists()


def test_without_a_file_the_keys_of_the_state_directory_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_command, "state_folder", lambda: tmp_path)
    assert "there is no key yet" in run().stderr
    with load_or_create_identity(tmp_path / "training.key") as identity:
        pass
    assert run().stdout == f"{identity.peer_id}  {tmp_path / 'training.key'}\n"
