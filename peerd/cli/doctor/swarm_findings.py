"""What the bootstrap peers and the running daemon say, as findings: pure functions from facts."""

from __future__ import annotations

from collections.abc import Sequence

from peerd.cli.doctor.facts import BootstrapFact, DaemonFact, DialFact, SwarmFact
from peerd.cli.doctor.finding import Finding, error, ok, warning
from peerd.cli.doctor.machine_findings import clock_findings
from peerd.reach.explaining import explain
from peerd.routing.clock import MAX_CORRECTION_OF_KEPT_S, MAX_CORRECTION_S, WARN_S
from peerd.routing.reach.verdict import Reach, Verdict, judge

# Beyond this a chain of two hops gives less than two tokens a second without guesses.
SLOW_S = 0.25


def clock_of_swarm(swarm: SwarmFact | None, *, is_kept: bool) -> list[Finding]:
    """Compares this machine's clock with those of the peers that answered, if any did."""
    answered = [peer for peer in swarm.bootstrap if not peer.problem] if swarm is not None else []
    by_network = {peer.network or str(peer.address): peer.ahead_s for peer in answered}
    limit_s = MAX_CORRECTION_OF_KEPT_S if is_kept else MAX_CORRECTION_S
    return clock_findings(list(by_network.values()), is_kept=is_kept, limit_s=limit_s, warn_s=WARN_S)


def swarm_findings(swarm: SwarmFact | None, daemon: DaemonFact) -> list[Finding]:
    """Whether the swarm can be joined, and whether others can dial this machine.

    A running daemon has been dialled by more peers than we ask, at its own port: what it says counts.
    """
    found = []
    if swarm is not None:
        found += [error("swarm", swarm.problem, "choose another --listen")] if swarm.problem else []
        found += bootstrap_findings(swarm.bootstrap)
    elif not daemon.peer_id:
        fix = "give --bootstrap ADDRESS, which a peer of the swarm printed, or set PEERD_BOOTSTRAP"
        found.append(warning("swarm", "no bootstrap peer was named, so none was asked", fix))
    if daemon.peer_id:
        return found + reach_of_daemon(daemon)
    if swarm is not None and not swarm.problem and any(not peer.problem for peer in swarm.bootstrap):
        found += dial_findings(swarm.dialled, may_be_relayed=swarm.may_be_relayed)
    return found


def bootstrap_findings(peers: Sequence[BootstrapFact]) -> list[Finding]:
    """Whether each of the bootstrap peers answers, and how far away it is. One that answers is enough to join."""
    some_answer = any(not peer.problem for peer in peers)
    found = []
    for peer in peers:
        if peer.problem:
            fix = "start it again, or ask its operator for its new address"
            if not some_answer:
                fix = f"{fix}; check the network and a firewall here, and that --swarm-key is the swarm's"
            make = warning if some_answer else error
            found.append(make("bootstrap", f"{peer.address} does not answer: {peer.problem}", fix))
            continue
        delay = "" if peer.rtt_s is None else f" in {peer.rtt_s * 1000:.0f} ms"
        said = f"{peer.address} answers{delay}{f', through the relay {peer.relay}' if peer.relay else ''}"
        if peer.rtt_s is not None and peer.rtt_s > SLOW_S:
            found.append(warning("bootstrap", said, "use a bootstrap peer that is nearer, or a better line"))
        else:
            found.append(ok("bootstrap", said))
    return found


def dial_findings(dialled: DialFact, *, may_be_relayed: bool) -> list[Finding]:
    """Whether others can dial us, by what they said when asked to try."""
    what = "reach"
    if not dialled.answers:
        why = "; ".join(dict.fromkeys(dialled.refusals)) or "no bootstrap peer answers such questions"
        return [warning(what, f"nobody tried to dial this machine: {why}", "run it again in a minute")]
    by_ip = {answer.ip: [one for one in dialled.answers if one.ip == answer.ip] for answer in dialled.answers}
    verdict = judge(Verdict(), [(dialled.ports, answers) for answers in by_ip.values()])
    if verdict.reach is Reach.PUBLIC:
        return [ok(what, explain(verdict, may_be_relayed=may_be_relayed))]
    if verdict.reach is Reach.UNKNOWN:
        return [warning(what, "some peers could dial this machine and others not", "run it again in a minute")]
    said, _, fix = explain(verdict, may_be_relayed=may_be_relayed).partition(": ")
    make = warning if may_be_relayed else error
    return [make(what, said, fix)]


def reach_of_daemon(daemon: DaemonFact) -> list[Finding]:
    """What the running daemon knows about being reached, and by which relays it is."""
    found = []
    if daemon.reach == Reach.PUBLIC.value:
        found.append(ok("reach", daemon.why))
    elif daemon.reach == Reach.UNKNOWN.value or not daemon.why.startswith("nobody can dial us"):
        found.append(ok("reach", f"not known: {daemon.why}"))
    else:
        said, _, fix = daemon.why.partition(": ")
        make = warning if daemon.relays else error
        found.append(make("reach", said, fix))
    if daemon.relays:
        found.append(ok("relay", f"others reach the daemon through {', '.join(daemon.relays)}"))
    return found


def daemon_findings(daemon: DaemonFact, own_version: str) -> list[Finding]:
    """Whether the daemon on this machine is up, runs this version, and can use its models."""
    what = "daemon"
    if daemon.problem:
        return [error(what, daemon.problem, "stop that process and start the daemon again; its log says more")]
    if not daemon.peer_id:
        return [ok(what, f"none listens on {daemon.socket_path}")]
    found = []
    if daemon.version != own_version:
        said = f"it runs {daemon.version}, while {own_version} is installed"
        found.append(warning(what, said, "start it again, so that it runs what is installed"))
    if not daemon.peers:
        fix = "wait a minute, or check its --bootstrap with: peerd doctor --bootstrap ADDRESS"
        found.append(warning(what, "it is connected to no other peer", fix))
    for gap in daemon.gaps:
        found.append(warning(what, gap, "wait, or serve these blocks: peerd --serve-blocks A:B ..."))
    return found or [ok(what, f"{daemon.peer_id} is up, connected to {daemon.peers} peers")]
