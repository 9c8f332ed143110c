from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from peerd.cli.keys.identity_file import KeyFileError, load_or_create_identity
from peerd.protocol.errors import CallerError
from peerd.protocol.identity import Identity

SEED = bytes(range(32))


def pem(key: Ed25519PrivateKey | X25519PrivateKey, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def write_key(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def identity_in(path: Path) -> Identity:
    with load_or_create_identity(path) as identity:
        return identity


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_use_makes_a_key_and_later_uses_find_it(tmp_path: Path) -> None:
    path = tmp_path / "peerd" / "identity.key"
    assert identity_in(path).seed == identity_in(path).seed


def test_two_files_hold_two_keys(tmp_path: Path) -> None:
    assert identity_in(tmp_path / "a").peer_id != identity_in(tmp_path / "b").peer_id


def test_only_the_owner_may_read_a_new_key_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "peerd" / "identity.key"
    before = os.umask(0)
    try:
        identity_in(path)
    finally:
        os.umask(before)
    assert mode_of(path) == 0o600
    assert mode_of(path.parent) == 0o700


def test_a_directory_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    identity_in(tmp_path / "identity.key")
    assert mode_of(tmp_path) == 0o755


def test_the_format_is_pkcs8_in_pem(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    identity = identity_in(path)
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(key, Ed25519PrivateKey)
    assert key.private_bytes_raw() == identity.seed
    given = write_key(tmp_path / "given.key", pem(Ed25519PrivateKey.from_private_bytes(SEED)))
    assert identity_in(given).peer_id == Identity.from_seed(SEED).peer_id


def test_a_key_in_use_is_refused_and_free_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    in_use = r"identity\.key is in use by another peerd.*--identity FILE"
    with load_or_create_identity(path) as identity, pytest.raises(KeyFileError, match=in_use):
        identity_in(path)
    assert identity_in(path).peer_id == identity.peer_id


def test_a_refused_second_user_does_not_free_the_key(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    with load_or_create_identity(path):
        for _ in range(2):
            with pytest.raises(KeyFileError, match="in use"):
                identity_in(path)


HOLDER = """
import sys
from pathlib import Path
from peerd.cli.keys.identity_file import load_or_create_identity
with load_or_create_identity(Path(sys.argv[1])) as identity:
    print(identity.peer_id, flush=True)
    sys.stdin.read()
"""


def test_a_killed_daemon_frees_its_key(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        peer_id = holder.stdout.readline().strip()
        with pytest.raises(KeyFileError, match="in use"):
            identity_in(path)
        holder.kill()
    assert identity_in(path).peer_id == peer_id


def test_children_do_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    with load_or_create_identity(path):
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        identity_in(path)
    finally:
        child.communicate()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_may_read_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = write_key(tmp_path / "identity.key", pem(Ed25519PrivateKey.from_private_bytes(SEED)), mode)
    with pytest.raises(KeyFileError, match=f"mode {mode:04o}.*chmod 600 {path}"):
        identity_in(path)
    path.chmod(0o600)
    assert identity_in(path).seed == SEED


def test_a_read_only_key_is_as_good(tmp_path: Path) -> None:
    path = write_key(tmp_path / "identity.key", pem(Ed25519PrivateKey.from_private_bytes(SEED)), 0o400)
    assert identity_in(path).seed == SEED


def test_a_start_that_was_cut_off_leaves_no_half_key(tmp_path: Path) -> None:
    path = write_key(tmp_path / "identity.key", b"")
    assert identity_in(path).seed == identity_in(path).seed


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        SEED,
        pem(Ed25519PrivateKey.from_private_bytes(SEED))[:-30],
        pem(Ed25519PrivateKey.from_private_bytes(SEED), password=b"secret"),
        pem(X25519PrivateKey.from_private_bytes(SEED)),
        b"-----BEGIN PRIVATE KEY-----\n" * 1000,
    ],
    ids=["text", "raw bytes", "truncated", "encrypted", "another kind of key", "too large"],
)
def test_what_is_no_key_is_refused_and_left_alone(tmp_path: Path, data: bytes) -> None:
    path = write_key(tmp_path / "identity.key", data)
    with pytest.raises(KeyFileError, match=r"identity\.key holds no unencrypted Ed25519 key"):
        identity_in(path)
    assert path.read_bytes() == data


def test_a_directory_in_the_key_s_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot use the key file"):
        identity_in(tmp_path)


def test_a_device_in_the_key_s_place_is_refused() -> None:
    with pytest.raises(KeyFileError, match="not a regular file"):
        identity_in(Path("/dev/null"))


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    write_key(tmp_path / "file", b"")
    with pytest.raises(CallerError, match="cannot use the key file"):
        identity_in(tmp_path / "file" / "identity.key")


def test_errors_of_the_caller_s_own_block_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), load_or_create_identity(tmp_path / "identity.key"):
        raise OSError("mine")
