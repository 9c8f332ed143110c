"""The key file of a private swarm."""

from __future__ import annotations

import errno
import os

import pytest

from peerd.cli.keys.swarm_key import create_swarm_key, read_swarm_key
from peerd.protocol.errors import InvalidRequest


def test_a_new_key_is_its_owner_s_alone_and_can_be_read_back(tmp_path):
    path, other = tmp_path / "swarm.key", tmp_path / "other.key"
    create_swarm_key(path)
    create_swarm_key(other)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(read_swarm_key(path)) == 32
    assert read_swarm_key(path) == read_swarm_key(path) != read_swarm_key(other)


def test_the_format_is_that_of_libp2p_s_private_networks(tmp_path):
    path = tmp_path / "swarm.key"
    path.touch(mode=0o600)
    path.write_text("/key/swarm/psk/1.0.0/\n/base16/\n" + "ab" * 32 + "\n")
    assert read_swarm_key(path) == b"\xab" * 32


def test_a_key_is_never_written_over(tmp_path):
    path = tmp_path / "swarm.key"
    create_swarm_key(path)
    key = read_swarm_key(path)
    with pytest.raises(InvalidRequest, match="already"):
        create_swarm_key(path)
    assert read_swarm_key(path) == key


def test_a_key_that_others_can_read_is_no_secret(tmp_path):
    path = tmp_path / "swarm.key"
    create_swarm_key(path)
    path.chmod(0o644)
    with pytest.raises(InvalidRequest, match="chmod 600"):
        read_swarm_key(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ab" * 32,
        "/key/swarm/psk/1.0.0/\n/base16/\n" + "ab" * 31,
        "/key/swarm/psk/1.0.0/\n/base64/\n" + "ab" * 32,
        "/key/swarm/psk/1.0.0/\n/base16/\n" + "xy" * 32,
    ],
)
def test_what_is_no_key_is_refused_with_what_makes_one(tmp_path, text):
    path = tmp_path / "swarm.key"
    path.touch(mode=0o600)
    path.write_text(text)
    with pytest.raises(InvalidRequest, match="keys new-swarm"):
        read_swarm_key(path)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_swarm_key(tmp_path / "missing")


def test_a_full_disk_leaves_no_half_of_a_key(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InvalidRequest, match="cannot be written: No space left"):
        create_swarm_key(tmp_path / "swarm.key")
    assert list(tmp_path.iterdir()) == []
