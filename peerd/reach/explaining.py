"""Says in words why others can or cannot dial us, and what an operator can do about it."""

from __future__ import annotations

from peerd.routing.reach.verdict import Reach, Verdict

# From here on Linux gives ports to programs that ask for any (net.ipv4.ip_local_port_range).
FIRST_CHOSEN_PORT = 32768


def explain(verdict: Verdict, *, may_be_relayed: bool) -> str:
    """One sentence, or "" where nobody has tried yet. may_be_relayed: whether relays may reach us."""
    if verdict.reach is Reach.PUBLIC:
        return f"others can dial us at {', '.join(map(str, verdict.proven))}"
    if verdict.reach is Reach.UNKNOWN:
        return ""
    if not verdict.failed:
        return "nobody can dial us: we listen on loopback only; use --listen /ip4/0.0.0.0/tcp/PORT/ws"
    tried = ", ".join(f"{address} ({outcome.replace('_', ' ')})" for address, outcome in verdict.failed)
    ports = " and ".join(dict.fromkeys(str(address.port) for address, _ in verdict.failed))
    # A port that the system chose is another one at the next start.
    chosen = [address for address, _ in verdict.failed if address.port >= FIRST_CHOSEN_PORT]
    keep = f" (and keep it with --listen /ip4/0.0.0.0/tcp/{chosen[0].port}/ws)" if chosen else ""
    if may_be_relayed:
        until_then = "until then others can reach us only through relays"
    else:
        until_then = "until then others cannot reach us at all, because relays are switched off (--no-relay)"
    return (
        f"nobody can dial us at {tried}: forward TCP port {ports} on the router or open it in the firewall{keep},"
        f" or give the address that reaches this machine with --announce; {until_then}"
    )
