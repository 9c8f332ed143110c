"""What facts mean: each row is a fact, the level of what is found, and words of the message and of its fix."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from peerd.cli.doctor.facts import (
    BootstrapFact,
    DaemonFact,
    DialFact,
    FileFact,
    FolderFact,
    HubFact,
    KeyFact,
    LimitsFact,
    PackageFact,
    SwarmFact,
    TrialFact,
)
from peerd.cli.doctor.finding import Finding, Level, error, ok, warning, worst
from peerd.cli.doctor.machine_findings import (
    clock_findings,
    disk_findings,
    hub_findings,
    identity_findings,
    limits_findings,
    memory_findings,
    state_findings,
    token_findings,
    trial_findings,
    version_findings,
)
from peerd.cli.doctor.report import as_json, as_text
from peerd.cli.doctor.swarm_findings import (
    bootstrap_findings,
    clock_of_swarm,
    daemon_findings,
    dial_findings,
    swarm_findings,
)
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.messages.dialback import Dialled

FILE = Path("/state/identity.key")
SOCKET = Path("/run/peerd.sock")
ADDRESS = Multiaddr.parse("/ip4/5.1.1.1/tcp/31330/ws/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA")
OTHER = Multiaddr.parse("/ip4/5.2.2.2/tcp/31330/ws/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA")
HERE = ip_address("6.6.6.6")
GIB = 2**30


def check(found: list[Finding], level: Level, said: str, fix: str) -> None:
    assert worst(found) is level
    bad = [finding for finding in found if finding.level is level]
    assert any(said in finding.said and fix in finding.fix for finding in bad), found
    for finding in found:
        assert bool(finding.fix) == (finding.level is not Level.OK), "what is wrong has a fix, and only that"


@pytest.mark.parametrize(
    ("key", "level", "said", "fix"),
    [
        (KeyFact(file=FileFact(path=FILE), peer_id="12D3x"), Level.OK, "is 12D3x", ""),
        (KeyFact(file=FileFact(path=FILE), peer_id="12D3x", in_use=True), Level.OK, "a daemon uses it", ""),
        (KeyFact(file=FileFact(path=FILE, exists=False)), Level.OK, "the first daemon makes it", ""),
        (KeyFact(file=FileFact(path=FILE, exists=False), can_be_made=False), Level.ERROR, "created", "--identity"),
        (KeyFact(file=FileFact(path=FILE, is_ours=False)), Level.ERROR, "another user", "as that user"),
        (KeyFact(file=FileFact(path=FILE, mode=0o640)), Level.ERROR, "mode 0640", f"chmod 600 {FILE}"),
        (KeyFact(file=FileFact(path=FILE, problem="holds no key")), Level.ERROR, "holds no key", "restore"),
    ],
)
def test_a_key_is_judged_by_what_a_daemon_could_do_with_it(key: KeyFact, level: Level, said: str, fix: str) -> None:
    check(identity_findings(key), level, said, fix)


@pytest.mark.parametrize(
    ("file", "level", "said", "fix"),
    [
        (FileFact(path=FILE), Level.OK, "1 files", ""),
        (FileFact(path=FILE, exists=False, problem="is damaged"), Level.OK, "0 files", ""),
        (FileFact(path=FILE, problem="is damaged"), Level.WARNING, "is damaged", "delete it"),
        (FileFact(path=FILE, mode=0o644), Level.WARNING, "mode 0644", "chmod go="),
        (FileFact(path=FILE, is_ours=False), Level.ERROR, "another user", "as that user"),
    ],
)
def test_a_damaged_state_file_only_slows_the_next_start(file: FileFact, level: Level, said: str, fix: str) -> None:
    check(state_findings([file]), level, said, fix)


def test_a_token_that_others_can_read_is_an_error() -> None:
    assert token_findings(FileFact(path=FILE, exists=False)) == []
    check(token_findings(FileFact(path=FILE)), Level.OK, "only yours", "")
    check(token_findings(FileFact(path=FILE, mode=0o604)), Level.ERROR, "use the local API", "makes a new one")
    check(token_findings(FileFact(path=FILE, problem="is damaged")), Level.ERROR, "is damaged", "--token-file")


@pytest.mark.parametrize(
    ("state", "cache", "level", "said", "fix"),
    [
        ((GIB, True), (100 * GIB, True), Level.OK, "100 GiB free", ""),
        ((1000, True), (100 * GIB, True), Level.ERROR, "1000 B free", "free some space"),
        ((GIB, False), (100 * GIB, True), Level.ERROR, "cannot be written", "--identity FILE"),
        ((GIB, True), (GIB, True), Level.WARNING, "1 GiB free", "--disk SIZE"),
        ((GIB, True), (GIB, False), Level.ERROR, "cannot be written", "HF_HOME"),
    ],
)
def test_a_full_disk_is_an_error_for_state_and_a_warning_for_models(
    state: tuple[int, bool], cache: tuple[int, bool], level: Level, said: str, fix: str
) -> None:
    folders = (FolderFact(Path("/state"), "state", *state), FolderFact(Path("/cache"), "models", *cache))
    check(disk_findings(*folders), level, said, fix)


@pytest.mark.parametrize(
    ("free", "level", "fix"),
    [(8 * GIB, Level.OK, ""), (GIB, Level.WARNING, "bootstrap peer"), (64 * 2**20, Level.ERROR, "MemoryMax=")],
)
def test_memory_is_judged_by_what_it_is_enough_for(free: int, level: Level, fix: str) -> None:
    check(memory_findings(free), level, "free, by the machine", fix)


def test_a_low_limit_of_open_files_is_said_with_the_peers_that_it_allows() -> None:
    check(limits_findings(LimitsFact(8192, 8192, 1024, 1024)), Level.OK, "1024 peers", "")
    check(limits_findings(LimitsFact(256, 8192, 96, 1024)), Level.WARNING, "96 peers", "LimitNOFILE=")


@pytest.mark.parametrize(
    ("package", "level", "said", "fix"),
    [
        (PackageFact("trio", ">=0.27", "0.30", fits=True), Level.OK, "1 packages", ""),
        (PackageFact("trio", ">=0.27", None, fits=False), Level.ERROR, "not installed", "pip install 'trio>=0.27'"),
        (PackageFact("trio", ">=0.27", "0.2", fits=False), Level.ERROR, "trio 0.2", "pip install 'trio>=0.27'"),
        (PackageFact("transformers", ">=5.18,<6", "5.24.3", fits=True), Level.OK, "1 packages", ""),
        (PackageFact("transformers", ">=5.18,<6", "5.25.0", fits=True), Level.WARNING, "newer than 5.24", "5.24.*"),
    ],
)
def test_versions_outside_of_the_tested_range_are_named(
    package: PackageFact, level: Level, said: str, fix: str
) -> None:
    check(version_findings([package], "5.24"), level, said, fix)


@pytest.mark.parametrize(
    ("hub", "level", "said", "fix"),
    [
        (HubFact("http://hub", status=401), Level.OK, "answers", ""),
        (HubFact("http://hub", status=200, has_token=True), Level.OK, "takes the token", ""),
        (HubFact("http://hub", status=401, has_token=True), Level.WARNING, "refuses the token", "HF_TOKEN"),
        (HubFact("http://hub", status=503), Level.WARNING, "answers 503", "later"),
        (HubFact("http://hub", is_offline=True), Level.WARNING, "HF_HUB_OFFLINE", "unset it"),
        (HubFact("http://hub", problem="no route"), Level.WARNING, "no route", "check the network"),
        (HubFact("http://hub", problem="no route", is_proxied=True), Level.WARNING, "no route", "HTTPS_PROXY"),
    ],
)
def test_a_hub_that_cannot_be_used_is_a_warning(hub: HubFact, level: Level, said: str, fix: str) -> None:
    check(hub_findings(hub), level, said, fix)


def test_only_a_device_that_does_not_compute_is_an_error() -> None:
    check(trial_findings(TrialFact("device", "cpu")), Level.OK, "cpu", "")
    check(trial_findings(TrialFact("device", "", "crashed", "mend", is_needed=True)), Level.ERROR, "crashed", "mend")
    check(trial_findings(TrialFact("triton", "", "crashed", "mend")), Level.WARNING, "crashed", "mend")


@pytest.mark.parametrize(
    ("ahead_s", "is_kept", "level", "said"),
    [
        ((), True, Level.OK, "keeps it right"),
        ((), False, Level.WARNING, "no program keeps it right"),
        ((3.0, -1.0, 2.0), False, Level.OK, "2.0 s behind the median of 3 peers"),
        ((-90.0,), False, Level.WARNING, "90.0 s ahead of one peer: one of the two is wrong"),
        ((90.0, 91.0), False, Level.WARNING, "makes up for"),
        ((9000.0, 9001.0), False, Level.ERROR, "others do not see"),
    ],
)
def test_a_clock_is_wrong_by_the_median_of_others(
    ahead_s: tuple[float, ...], is_kept: bool, level: Level, said: str
) -> None:
    check(clock_findings(ahead_s, is_kept=is_kept, limit_s=600, warn_s=30), level, said, "" if not level else "NTP")


def test_peers_of_one_network_are_one_witness_of_the_time() -> None:
    crowd = [BootstrapFact(ADDRESS, ahead_s=5000.0, network="5.1.1.0/24") for _ in range(3)]
    crowd.append(BootstrapFact(OTHER, ahead_s=0.0, network="5.2.2.0/24"))
    crowd.append(BootstrapFact(OTHER, ahead_s=1.0, network="5.3.3.0/24"))
    check(clock_of_swarm(SwarmFact(tuple(crowd)), is_kept=False), Level.OK, "1.0 s behind", "")


def test_one_bootstrap_peer_that_answers_is_enough() -> None:
    silent, good = BootstrapFact(ADDRESS, "refused"), BootstrapFact(OTHER, rtt_s=0.02)
    check(bootstrap_findings([silent, good]), Level.WARNING, "refused", "start it again")
    check(bootstrap_findings([silent]), Level.ERROR, "refused", "--swarm-key")
    check(bootstrap_findings([good]), Level.OK, "in 20 ms", "")
    check(bootstrap_findings([BootstrapFact(OTHER, rtt_s=0.6)]), Level.WARNING, "in 600 ms", "nearer")
    check(bootstrap_findings([BootstrapFact(OTHER, rtt_s=0.02, relay="12D3r")]), Level.OK, "the relay 12D3r", "")


@pytest.mark.parametrize(
    ("outcomes", "may_be_relayed", "level", "said", "fix"),
    [
        (("reached", "reached"), True, Level.OK, "/ip4/6.6.6.6/tcp/31330", ""),
        (("silent", "silent"), True, Level.WARNING, "silent", "forward TCP port 31330"),
        (("silent", "silent"), False, Level.ERROR, "silent", "cannot reach us at all"),
        (("reached", "silent"), True, Level.WARNING, "some peers could", "again"),
        ((), True, Level.WARNING, "too soon", "again"),
    ],
)
def test_reach_follows_from_what_peers_found_when_they_dialled(
    outcomes: tuple[str, ...], may_be_relayed: bool, level: Level, said: str, fix: str
) -> None:
    answers = tuple(Dialled(HERE, (outcome,)) for outcome in outcomes)  # type: ignore[arg-type]
    dialled = DialFact((31330,), answers, () if answers else ("too soon", "too soon"))
    check(dial_findings(dialled, may_be_relayed=may_be_relayed), level, said, fix)


def test_nobody_is_asked_without_a_bootstrap_peer() -> None:
    none = DaemonFact(SOCKET)
    check(swarm_findings(None, none), Level.WARNING, "no bootstrap peer was named", "--bootstrap")
    check(swarm_findings(SwarmFact(problem="cannot listen"), none), Level.ERROR, "cannot listen", "--listen")


def test_what_a_running_daemon_says_of_its_reach_counts() -> None:
    up = {"version": "1", "peer_id": "12D3x", "peers": 2}
    dialled = SwarmFact((BootstrapFact(ADDRESS, rtt_s=0.01),), DialFact((1,), (Dialled(HERE, ("silent",)),)))
    public = DaemonFact(SOCKET, **up, reach="public", why="others can dial us")  # type: ignore[arg-type]
    check(swarm_findings(dialled, public), Level.OK, "others can dial us", "")
    why = "nobody can dial us at /ip4/6.6.6.6/tcp/1/ws (silent): forward TCP port 1"
    hidden = DaemonFact(SOCKET, **up, reach="private", why=why)  # type: ignore[arg-type]
    check(swarm_findings(None, hidden), Level.ERROR, "nobody can dial us", "forward TCP port 1")
    relayed = DaemonFact(SOCKET, **up, reach="private", why=why, relays=("12D3r",))  # type: ignore[arg-type]
    check(swarm_findings(None, relayed), Level.WARNING, "nobody can dial us", "forward")
    assert any("through 12D3r" in finding.said for finding in swarm_findings(None, relayed))


def test_a_daemon_is_named_with_what_it_lacks() -> None:
    check(daemon_findings(DaemonFact(SOCKET), "1"), Level.OK, "none listens", "")
    check(daemon_findings(DaemonFact(SOCKET, problem="silent"), "1"), Level.ERROR, "silent", "stop that process")
    up = DaemonFact(SOCKET, version="1", peer_id="12D3x", peers=2)
    check(daemon_findings(up, "1"), Level.OK, "connected to 2 peers", "")
    check(daemon_findings(up, "2"), Level.WARNING, "runs 1, while 2", "start it again")
    alone = DaemonFact(SOCKET, version="1", peer_id="12D3x", gaps=("smol needs 2 more blocks: 4-5",))
    check(daemon_findings(alone, "1"), Level.WARNING, "no other peer", "--bootstrap")
    check(daemon_findings(alone, "1"), Level.WARNING, "smol needs 2 more blocks: 4-5", "--serve-blocks")


FINDINGS = [ok("disk", "80 GiB free"), warning("hub", "does not answer", "check the network"), error("x", "y", "z")]


def test_the_report_wraps_words_to_the_terminal_and_counts_problems() -> None:
    text = as_text(FINDINGS, 30)
    assert max(map(len, text.splitlines())) <= 30
    assert text.splitlines()[0] == "ok: disk: 80 GiB free"
    assert "  fix: check the network" in text.splitlines()
    assert text.endswith("\n1 error, 1 warning")
    assert as_text(FINDINGS[:1], None).endswith("\nnothing is wrong")


def test_the_report_breaks_no_lines_for_a_pipe() -> None:
    long = ok("bootstrap", "word " * 100)
    assert len(as_text([long], None).splitlines()[0]) > 500
    assert '"worst": "error"' in as_json(FINDINGS)
