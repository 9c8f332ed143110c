"""Where the daemon listens: it replaces stale sockets, not live ones, and refuses a folder that another user made."""

from __future__ import annotations

import os
import socket
import stat

import pytest

from peerd.api import sockets
from peerd.api.sockets import listen_tcp, listen_unix
from peerd.local.socket_path import default_socket_path
from peerd.protocol.errors import InvalidRequest


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_socket_is_its_owner_s_alone_and_goes_with_the_daemon(tmp_path):
    path = tmp_path / "p.sock"
    with listen_unix(path):
        assert mode(path) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_a_second_daemon_on_a_live_socket_is_refused_and_harms_nothing(tmp_path):
    path = tmp_path / "p.sock"
    with listen_unix(path):
        with pytest.raises(InvalidRequest, match="another peerd listens"), listen_unix(path):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_another_program_s_live_socket_is_left_alone(tmp_path):
    path = tmp_path / "p.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(InvalidRequest, match="another program"), listen_unix(path):
            pass
        assert path.exists()


def test_a_socket_that_a_dead_daemon_left_is_taken_over(tmp_path):
    path = tmp_path / "p.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listen_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_file_that_is_no_socket_is_never_removed(tmp_path):
    path = tmp_path / "p.sock"
    path.write_text("precious")
    with pytest.raises(InvalidRequest, match="not a socket"), listen_unix(path):
        pass
    assert path.read_text() == "precious"


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path):
    target = tmp_path / "elsewhere"
    (tmp_path / "p.sock.lock").symlink_to(target)
    with pytest.raises(InvalidRequest, match=r"p\.sock\.lock"), listen_unix(tmp_path / "p.sock"):
        pass
    assert not target.exists()


@pytest.mark.parametrize(
    ("path", "said"),
    [("missing/p.sock", "not a directory"), ("p" * 120, "longer than")],
    ids=["not a directory", "too long"],
)
def test_a_path_that_cannot_be_is_refused_with_the_reason(tmp_path, path, said):
    with pytest.raises(InvalidRequest, match=said), listen_unix(tmp_path / path):
        pass


def test_the_path_is_in_the_runtime_directory_where_there_is_one(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert str(default_socket_path()) == "/run/user/7/peerd.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert str(default_socket_path()) == f"/tmp/peerd-{os.getuid()}/peerd.sock"


def test_our_folder_is_made_for_us_alone(tmp_path, monkeypatch):
    folder = tmp_path / "peerd-1"
    monkeypatch.setattr(sockets, "own_folder", lambda: folder)
    with listen_unix(folder / "peerd.sock"):
        assert mode(folder) == 0o700


@pytest.mark.parametrize("prepare", ["open to others", "a link"])
def test_a_folder_that_another_user_prepared_is_refused(tmp_path, monkeypatch, prepare):
    folder = tmp_path / "peerd-1"
    if prepare == "a link":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    monkeypatch.setattr(sockets, "own_folder", lambda: folder)
    with pytest.raises(InvalidRequest, match="0700"), listen_unix(folder / "peerd.sock"):
        pass


def test_a_port_that_is_taken_is_refused_with_the_option_to_change():
    with listen_tcp("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InvalidRequest, match="choose another --http"), listen_tcp("127.0.0.1", port):
            pass
