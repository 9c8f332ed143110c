"""Downloads: complete or not at all, never twice, by one process at a time, within the limit on disk space."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from peerd.compute.checkpoint.hub.cache import HubCache
from peerd.compute.checkpoint.hub.disk_ledger import DiskLedger
from peerd.compute.checkpoint.hub.fetch import Fetcher
from peerd.compute.checkpoint.hub.http import Hub, Listing
from peerd.compute.checkpoint.hub.id import HubId
from peerd.compute.checkpoint.hub.settings import HubSettings, Transfer
from peerd.compute.errors import CheckpointError, DiskFullError, HubUnavailableError
from tests.fakes.hub.server import SEND_BYTES, Fault, HubServer, open_hub

REPO = "org/files"
SIZE = 20 * SEND_BYTES
NAMES = ("a.safetensors", "b.safetensors", "c.safetensors")


@pytest.fixture(autouse=True)
def _own_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with open_hub() as server:
        yield server


@pytest.fixture
def content(hub: HubServer, tmp_path: Path) -> dict[str, bytes]:
    """What the files hold, by name; published."""
    return publish(hub, tmp_path / "content", NAMES)


@pytest.fixture
def settings(hub: HubServer, tmp_path: Path) -> HubSettings:
    return HubSettings(endpoint=hub.url, cache_dir=tmp_path / "hf", retry_delays_s=(0.0, 0.0))


def publish(hub: HubServer, folder: Path, names: Sequence[str], repo: str = REPO) -> dict[str, bytes]:
    folder.mkdir()
    content = {name: random.Random(f"{repo}/{name}").randbytes(SIZE) for name in names}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    hub.push(repo, folder)
    return content


class Files:
    """A repository's files, obtained as a checkpoint does it. Close it to let go of them."""

    def __init__(self, settings: HubSettings, repo: str = REPO) -> None:
        self.cache = HubCache(settings, repo)
        hub = Hub(settings)
        self.listing: Listing = hub.listing(HubId(repo))
        self._fetcher = Fetcher(hub, self.cache, settings)
        self._held: list[int] = []

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        while self._held:
            os.close(self._held.pop())

    def obtain(self, *names: str) -> None:
        self._held += self._fetcher.obtain(self.listing, [self.listing.files[name] for name in names]).values()

    def path(self, name: str) -> Path:
        return self.cache.snapshot(self.listing.commit) / name

    def partial(self, name: str) -> Path:
        return self.cache.partial(self.listing.files[name])


def here(settings: HubSettings, repo: str = REPO) -> set[str]:
    """The names of the files that are on the disk, whole."""
    folder = HubCache(settings, repo).folder / "snapshots"
    return {path.name for path in folder.glob("*/*") if path.exists()}


def bounded(settings: HubSettings, files: float) -> HubSettings:
    return dataclasses.replace(settings, disk_bytes=int(files * SIZE))


def test_files_come_as_they_are_and_once(hub: HubServer, settings: HubSettings, content: dict[str, bytes]) -> None:
    for _ in range(2):
        with Files(settings) as files:
            files.obtain(*NAMES)
            assert {name: files.path(name).read_bytes() for name in NAMES} == content
    assert hub.served == dict.fromkeys(NAMES, SIZE)
    assert not list(settings.folder.rglob("*incomplete*"))


def test_a_broken_connection_costs_no_byte_twice(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes]
) -> None:
    hub.fail("a.safetensors", *(Fault(cut_after=4 * SEND_BYTES) for _ in range(4)))
    with Files(settings) as files:
        files.obtain("a.safetensors")
        assert files.path("a.safetensors").read_bytes() == content["a.safetensors"]
    assert hub.served["a.safetensors"] == SIZE, "4 breaks, each after some progress, with only 2 retries without any"


def test_a_hub_that_fails_for_good_leaves_what_arrived_for_the_next_time(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes]
) -> None:
    hub.fail("a.safetensors", Fault(cut_after=8 * SEND_BYTES), *[Fault(status=503)] * 3)
    with Files(settings) as files:
        with pytest.raises(HubUnavailableError, match=rf"503.*{8 * SEND_BYTES} of {SIZE} bytes are kept"):
            files.obtain("a.safetensors")
        assert here(settings) == set(), "half a file has no name yet"
        files.obtain("a.safetensors")
        assert files.path("a.safetensors").read_bytes() == content["a.safetensors"]
    assert hub.served["a.safetensors"] == SIZE


def test_a_hub_without_ranges_sends_all_again(hub: HubServer, settings: HubSettings, content: dict[str, bytes]) -> None:
    hub.fail("a.safetensors", Fault(cut_after=4 * SEND_BYTES), Fault(ignore_range=True))
    with Files(settings) as files:
        files.obtain("a.safetensors")
        assert files.path("a.safetensors").read_bytes() == content["a.safetensors"]


def test_another_content_than_listed_is_deleted_and_said(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes]
) -> None:
    hub.fail("a.safetensors", Fault(corrupt=True))
    with Files(settings) as files:
        with pytest.raises(CheckpointError, match=r"a\.safetensors as the hub sent it does not have the hash"):
            files.obtain("a.safetensors")
        assert here(settings) == set()
        assert files.partial("a.safetensors").stat().st_size == 0
        files.obtain("a.safetensors")
        assert files.path("a.safetensors").read_bytes() == content["a.safetensors"]


def test_a_small_file_is_checked_too(hub: HubServer, settings: HubSettings, tmp_path: Path) -> None:
    publish(hub, tmp_path / "small", ["config.json"])
    hub.fail("config.json", Fault(corrupt=True))
    with Files(settings) as files, pytest.raises(CheckpointError, match="does not have the hash"):
        files.obtain("config.json")


def test_a_damaged_part_of_an_earlier_run_is_fetched_again(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes]
) -> None:
    with Files(settings) as files:
        for damaged in (bytes(5 * SEND_BYTES), bytes(SIZE + 1)):
            shutil.rmtree(files.cache.folder, ignore_errors=True)
            files.partial("a.safetensors").parent.mkdir(parents=True)
            files.partial("a.safetensors").write_bytes(damaged)
            files.obtain("a.safetensors")
            assert files.path("a.safetensors").read_bytes() == content["a.safetensors"]


def test_a_watcher_sees_the_progress_and_can_stop_it(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes]
) -> None:
    class Enough(Exception):
        pass

    seen: list[Transfer] = []
    go_on = threading.Event()
    # What is stopped ends with the next data, which may be all the rest.
    hub_stalls = threading.Timer(1.0, go_on.set)

    def watch(transfer: Transfer) -> None:
        seen.append(transfer)
        if transfer.done_bytes >= 8 * SEND_BYTES:
            hub_stalls.start()
            raise Enough

    hub.fail("a.safetensors", Fault(cut_after=8 * SEND_BYTES, wait_for=go_on))
    with Files(dataclasses.replace(settings, watch=watch)) as files:
        with pytest.raises(Enough):
            files.obtain("a.safetensors")
        hub_stalls.join()
        running = [thread.name for thread in threading.enumerate()]
        assert not [name for name in running if name.startswith("peerd-fetch")], "no download runs on"
        assert arrived(files) >= 8 * SEND_BYTES
    assert {transfer.name for transfer in seen} == {REPO}
    assert {transfer.total_bytes for transfer in seen} == {SIZE}
    with Files(settings) as files:
        files.obtain("a.safetensors")
        assert files.path("a.safetensors").read_bytes() == content["a.safetensors"]


def arrived(files: Files) -> int:
    """How many bytes of the file are on the disk, whether it is complete or not."""
    partial = files.partial("a.safetensors")
    return (partial if partial.exists() else files.path("a.safetensors")).stat().st_size


FETCH = """
import signal, sys
from peerd.compute.checkpoint.hub.http import Hub
from peerd.compute.checkpoint.hub.cache import HubCache
from peerd.compute.checkpoint.hub.fetch import Fetcher
from peerd.compute.checkpoint.hub.id import HubId
from peerd.compute.checkpoint.hub.settings import HubSettings

def interrupted(*_):
    print("interrupted", flush=True)
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupted)
settings = HubSettings()
hub, cache = Hub(settings), HubCache(settings, "org/files")
listing = hub.listing(HubId("org/files"))
print("ready", flush=True)
sys.stdin.readline()
Fetcher(hub, cache, settings).obtain(listing, [listing.files[name] for name in sys.argv[1:]])
print("done", flush=True)
sys.stdin.readline()
"""

StartFetch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_fetch(hub: HubServer, settings: HubSettings) -> Iterator[StartFetch]:
    """Start a process that is `ready`, fetches the named files after a line of input, and holds them until another."""
    processes: list[subprocess.Popen[str]] = []
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(settings.folder.parent), "HF_TOKEN": "hf_good"}
    environment["HF_HUB_CACHE"] = str(settings.folder)

    def start(*names: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", FETCH, *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.processes
def test_two_processes_that_want_the_same_files_fetch_each_once(
    hub: HubServer, content: dict[str, bytes], settings: HubSettings, start_fetch: StartFetch
) -> None:
    one, two = start_fetch(*NAMES), start_fetch(*reversed(NAMES))
    assert [hear(one), hear(two)] == ["ready", "ready"]
    go_on = threading.Event()
    for name in NAMES:
        hub.fail(name, Fault(cut_after=4 * SEND_BYTES, wait_for=go_on))
    tell(one)
    hub.wait_until_served("a.safetensors", 4 * SEND_BYTES)
    tell(two)
    go_on.set()
    assert [hear(one), hear(two)] == ["done", "done"]
    assert hub.served == dict.fromkeys(NAMES, SIZE)
    with Files(settings) as files:
        assert {name: files.path(name).read_bytes() for name in NAMES} == content


@pytest.mark.processes
def test_a_waiter_for_a_process_that_dies_goes_on_where_that_was(
    hub: HubServer, content: dict[str, bytes], settings: HubSettings, start_fetch: StartFetch
) -> None:
    one, two = start_fetch("a.safetensors"), start_fetch("a.safetensors")
    assert [hear(one), hear(two)] == ["ready", "ready"]
    go_on = threading.Event()
    hub.fail("a.safetensors", Fault(cut_after=8 * SEND_BYTES, wait_for=go_on))
    tell(one)
    hub.wait_until_served("a.safetensors", 8 * SEND_BYTES)
    tell(two)
    with Files(settings) as files:
        deadline = time.monotonic() + 10
        while files.partial("a.safetensors").stat().st_size < 8 * SEND_BYTES:
            assert time.monotonic() < deadline, "what was sent was not written"
        one.kill()
        go_on.set()
        assert hear(two) == "done"
        assert hub.answers == [("a.safetensors", 0), ("a.safetensors", 8 * SEND_BYTES)]
        assert files.path("a.safetensors").read_bytes() == content["a.safetensors"]


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_a_killed_process_fetched_is_not_fetched_again(
    hub: HubServer, content: dict[str, bytes], settings: HubSettings, start_fetch: StartFetch, number: signal.Signals
) -> None:
    process = start_fetch("a.safetensors")
    assert hear(process) == "ready"
    go_on = threading.Event()
    hub.fail("a.safetensors", Fault(cut_after=8 * SEND_BYTES, wait_for=go_on))
    tell(process)
    with Files(settings) as files:
        hub.wait_until_served("a.safetensors", 8 * SEND_BYTES)
        deadline = time.monotonic() + 10
        while files.partial("a.safetensors").stat().st_size < 8 * SEND_BYTES:
            assert time.monotonic() < deadline, "what was sent was not written"
        process.send_signal(number)
        if number == signal.SIGINT:
            assert hear(process) == "interrupted"
            # What is stopped ends with the next data, which may be all the rest; and it is stopped a moment after this.
            threading.Timer(1.0, go_on.set).start()
        process.wait(20)
        go_on.set()
        kept = arrived(files)
        assert kept >= 8 * SEND_BYTES
        files.obtain("a.safetensors")
        assert hub.answers == [("a.safetensors", 0), *([("a.safetensors", kept)] if kept < SIZE else [])]
        assert files.path("a.safetensors").read_bytes() == content["a.safetensors"]


@pytest.mark.processes
def test_a_file_that_another_process_uses_is_not_evicted(
    content: dict[str, bytes], settings: HubSettings, start_fetch: StartFetch
) -> None:
    process = start_fetch("a.safetensors")
    hear(process)
    tell(process)
    assert hear(process) == "done"
    with Files(bounded(settings, 2)) as files:
        files.obtain("b.safetensors")
    with Files(bounded(settings, 2)) as files:
        files.obtain("c.safetensors")
    assert here(settings) == {"a.safetensors", "c.safetensors"}, "a is the oldest, but in use"
    tell(process)
    process.wait(10)
    with Files(bounded(settings, 2)) as files:
        files.obtain("b.safetensors")
    assert here(settings) == {"b.safetensors", "c.safetensors"}


def test_what_was_used_least_recently_goes_first(settings: HubSettings, content: dict[str, bytes]) -> None:
    for name in NAMES[:2]:
        with Files(bounded(settings, 2)) as files:
            files.obtain(name)
    with Files(settings) as files:
        files.obtain("a.safetensors")  # used again, not fetched
    with Files(bounded(settings, 2)) as files:
        files.obtain("c.safetensors")
    assert here(settings) == {"a.safetensors", "c.safetensors"}


def test_no_more_is_deleted_than_is_needed(hub: HubServer, settings: HubSettings, tmp_path: Path) -> None:
    names = [f"{number}.safetensors" for number in range(6)]
    publish(hub, tmp_path / "many", names)
    for name in names[:5]:
        with Files(settings) as files:
            files.obtain(name)
    with Files(bounded(settings, 5.9)) as files:
        files.obtain(names[5])
    assert here(settings) == set(names[1:])


def test_files_of_other_models_are_evicted_with_all_their_names(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes], tmp_path: Path
) -> None:
    publish(hub, tmp_path / "other", ["x.safetensors"], repo="org/other")
    with Files(settings, "org/other") as files:
        files.obtain("x.safetensors")
        blob = files.path("x.safetensors").resolve()
    with Files(bounded(settings, 1)) as files:
        files.obtain("a.safetensors")
    assert not blob.exists()
    assert not [path for path in settings.folder.rglob("*") if path.is_symlink() and not path.exists()]
    with Files(bounded(settings, 1), "org/other") as files:
        files.obtain("x.safetensors")
    assert (here(settings), here(settings, "org/other")) == (set(), {"x.safetensors"})


def test_what_other_programs_fetched_is_never_deleted(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes]
) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, "a.safetensors", cache_dir=settings.folder, endpoint=hub.url, token=False)
    with Files(bounded(settings, 1)) as files:
        files.obtain("a.safetensors")
    for name in NAMES[1:]:
        with Files(bounded(settings, 1)) as files:
            files.obtain(name)
    assert here(settings) == {"a.safetensors", "c.safetensors"}


def test_a_file_that_another_program_fetched_again_is_its_own(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes]
) -> None:
    """Another program emptied the cache, so peerd's ledger is about other files."""
    from huggingface_hub import hf_hub_download

    with Files(settings) as files:
        files.obtain("a.safetensors")
        shutil.rmtree(files.cache.folder)
    hf_hub_download(REPO, "a.safetensors", cache_dir=settings.folder, endpoint=hub.url, token=False)
    assert DiskLedger(settings.own_folder).entries() == {}
    with Files(bounded(settings, 1)) as files:
        files.obtain("b.safetensors")
    assert here(settings) == {"a.safetensors", "b.safetensors"}


def test_half_a_file_that_nobody_fetches_any_more_makes_room(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes]
) -> None:
    hub.fail("a.safetensors", Fault(cut_after=8 * SEND_BYTES), *[Fault(status=503)] * 3)
    with Files(settings) as files:
        with pytest.raises(HubUnavailableError):
            files.obtain("a.safetensors")
        partial = files.partial("a.safetensors")
    with Files(bounded(settings, 1)) as files:
        files.obtain("b.safetensors")
    assert not partial.exists()


def test_what_cannot_fit_is_said_before_anything_is_fetched_or_deleted(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes], tmp_path: Path
) -> None:
    publish(hub, tmp_path / "other", ["x.safetensors", "y.safetensors"], repo="org/other")
    with Files(settings) as files:
        files.obtain("a.safetensors")
    served = hub.served.copy()
    with Files(bounded(settings, 1.5)) as files:
        with pytest.raises(DiskFullError, match=r"160 KiB have to be fetched.*--disk allows 120 KiB: raise it"):
            files.obtain("b.safetensors", "c.safetensors")
        assert here(settings) == {"a.safetensors"}
        with pytest.raises(
            DiskFullError, match=r"80 KiB have to be fetched beside 80 KiB that are here and needed too"
        ):
            files.obtain("a.safetensors", "b.safetensors")
        files.obtain("a.safetensors")
        with pytest.raises(DiskFullError, match=r"80 KiB are taken by files that running peers use.*stop one of them"):
            files.obtain("b.safetensors")
    assert hub.served == served
    with Files(settings) as files:
        files.obtain("b.safetensors")
        files.obtain("c.safetensors")
    with Files(settings) as files:
        files.obtain("b.safetensors")
        with (
            Files(bounded(settings, 2), "org/other") as others,
            pytest.raises(DiskFullError, match=r"are taken by files that running peers use"),
        ):
            others.obtain("x.safetensors", "y.safetensors")
        assert here(settings) == set(NAMES), "deleting the two that nobody uses would not have been enough"
    assert not list(settings.folder.rglob("*incomplete*"))


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with Files(settings) as files, pytest.raises(DiskFullError, match=r"80 KiB have to be fetched.*HF_HOME.*--disk"):
        files.obtain("a.safetensors")
    assert not hub.served


def test_a_disk_that_fills_up_meanwhile_keeps_what_arrived(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def write_some(fd: int, data: memoryview, position: int) -> int:
        if position >= 8 * SEND_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[: 8 * SEND_BYTES - position], position)

    with Files(settings) as files:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", write_some)
            with pytest.raises(DiskFullError, match=r"the disk is full.*what arrived is kept"):
                files.obtain("a.safetensors")
        files.obtain("a.safetensors")
        assert hub.answers[-1] == ("a.safetensors", 8 * SEND_BYTES)
        assert files.path("a.safetensors").read_bytes() == content["a.safetensors"]


def test_a_damaged_ledger_makes_nothing_ours(settings: HubSettings, content: dict[str, bytes]) -> None:
    with Files(settings) as files:
        files.obtain("a.safetensors")
    for damage in (b"", b"[]", b'{"x": 1}', b'{"x": {"size": 1}}', b"\xff"):
        (settings.own_folder / "ledger.json").write_bytes(damage)
        assert DiskLedger(settings.own_folder).entries() == {}
    with Files(bounded(settings, 1)) as files:
        files.obtain("b.safetensors")
    assert here(settings) == {"a.safetensors", "b.safetensors"}


def test_without_a_place_for_the_ledger_only_the_budget_fails(
    settings: HubSettings, content: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    with Files(settings) as files:
        files.obtain("a.safetensors")
        assert files.path("a.safetensors").read_bytes() == content["a.safetensors"]
    with Files(bounded(settings, 2)) as files, pytest.raises(CheckpointError, match="but --disk needs it"):
        files.obtain("b.safetensors")


def test_a_file_is_locked_for_reading_as_long_as_it_is_held(settings: HubSettings, content: dict[str, bytes]) -> None:
    with Files(settings) as files:
        files.obtain("a.safetensors")
        with files.path("a.safetensors").open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with files.path("a.safetensors").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_same_content_under_another_commit_is_not_fetched_again(
    hub: HubServer, settings: HubSettings, content: dict[str, bytes]
) -> None:
    with Files(settings) as files:
        files.obtain("a.safetensors")
    hub.repos[REPO].commits["e" * 40] = hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]
    hub.repos[REPO].refs["main"] = "e" * 40
    with Files(settings) as files:
        assert files.listing.commit == "e" * 40
        files.obtain("a.safetensors")
        assert files.path("a.safetensors").read_bytes() == content["a.safetensors"]
    assert hub.served["a.safetensors"] == SIZE


def test_without_locks_files_are_fetched_and_none_is_deleted(
    settings: HubSettings, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems of clusters have none."""
    lock = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(str(settings.folder)):
            raise OSError(errno.ENOSYS, "Function not implemented")
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Files(bounded(settings, 1)) as files:
        files.obtain("a.safetensors")
        assert files.path("a.safetensors").read_bytes() == content["a.safetensors"]
    with Files(bounded(settings, 1)) as files, pytest.raises(DiskFullError):
        files.obtain("b.safetensors")
    assert here(settings) == {"a.safetensors"}


def test_without_symbolic_links_it_works_too(
    settings: HubSettings, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_SYMLINKS", True)
    for name in NAMES[:2]:
        with Files(bounded(settings, 1)) as files:
            files.obtain(name)
            assert files.path(name).read_bytes() == content[name]
    assert here(settings) == {"b.safetensors"}
