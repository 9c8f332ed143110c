"""A small internet in network namespaces: public hosts, and private networks behind real masquerading.

Any user who may make a user namespace can make it, without root. It does not touch the machine's own network, and
leaves nothing behind: only one process and the peers keep the namespaces alive. The process ends when we close its
standard input or die, and each peer ends when its own standard input is closed.

    relay1 5.1.1.2 --+                      +-- NAT 6.1.1.2 -- 192.168.1.0/24: a (.2), neighbour (.3)
                     +---- the internet ----+
    relay2 5.2.2.2 --+                      +-- NAT 6.2.2.2 -- 192.168.2.0/24: b (.2)

The public addresses belong to real hosts, because the code under test must see them as public. No packet leaves the
namespaces: they have no way out.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import trio

RELAY1, RELAY2 = "5.1.1.2", "5.2.2.2"
NAT_A, NAT_B = "6.1.1.2", "6.2.2.2"
A, NEIGHBOUR, B = "192.168.1.2", "192.168.1.3", "192.168.2.2"
PUBLIC_HOSTS = {"relay1": RELAY1, "relay2": RELAY2}
# Router: its public address, and the hosts behind it.
PRIVATE_HOSTS = {"nat_a": (NAT_A, {"a": A, "neighbour": NEIGHBOUR}), "nat_b": (NAT_B, {"b": B})}
SETUP_S = 20.0
_DELAYING_WIRE = Path(__file__).with_name("delaying_wire.py")
_TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "nft": "nftables"}

Mapping = Literal["port preserving", "endpoint independent", "symmetric"]
_MAPPINGS = {
    "port preserving": ["masquerade"],
    "endpoint independent": ["tcp sport 31330 masquerade to :40404", "masquerade"],
    "symmetric": ["masquerade fully-random"],
}
# Inside to outside and what answers it; in from outside only what a port is forwarded for.
_NAT_RULES = """
table ip nat {
  chain pre { type nat hook prerouting priority dstnat; }
  chain post { type nat hook postrouting priority srcnat; oifname "out" masquerade; }
}
table ip filter {
  chain input { type filter hook input priority filter; policy drop; iifname { "lo", "in" } accept; ct state established,related accept; }
  chain forward { type filter hook forward priority filter; policy drop; ct state established,related accept; iifname "in" accept; ct status dnat accept; }
}
"""  # noqa: E501  # nft's own lines


def missing() -> str:
    """The reason why this machine cannot have a lab; "" if it can."""
    lacking = {package for tool, package in _TOOLS.items() if shutil.which(tool) is None}
    if lacking:
        return f"network namespaces need {' and '.join(sorted(lacking))}: apt-get install them"
    tried = subprocess.run([*_UNSHARE, "sh", "-ec", _setup()], capture_output=True, check=False)
    if tried.returncode:
        return f"this machine lets us make no networks with a NAT: {tried.stderr.decode().strip()[-200:]}"
    return ""


class NetLab:
    """The running lab. A command prefixed with `under(host)` runs on that host."""

    def __init__(self, holder: int) -> None:
        self._holder = holder

    @property
    def _enter(self) -> tuple[str, ...]:
        return ("nsenter", f"--target={self._holder}", "--user", "--mount", "--net", "--preserve-credentials")

    def under(self, host: str) -> tuple[str, ...]:
        """The prefix that makes a command run on a host."""
        return (*self._enter, "ip", "netns", "exec", host)

    async def run(self, host: str, *command: str) -> str:
        """The output of a command on a host. Raises subprocess.CalledProcessError."""
        done = await trio.run_process([*self.under(host), *command], capture_stdout=True, capture_stderr=True)
        return done.stdout.decode()

    async def forward(self, router: str, port: int, ip: str) -> None:
        """Forward the router's port to the same port of a host behind it."""
        rule = f'add rule ip nat pre iifname "out" tcp dport {port} dnat to {ip}:{port}'
        await self.run(router, "nft", rule)

    async def map_ports(self, router: str, mapping: Mapping) -> None:
        """Change how a router maps the ports of new connections; at first it preserves them."""
        await self.run(router, "nft", "flush chain ip nat post")
        for rule in _MAPPINGS[mapping]:
            await self.run(router, "nft", f'add rule ip nat post oifname "out" {rule}')

    @asynccontextmanager
    async def slowed(self, host: str, delay_ms: float) -> AsyncIterator[None]:
        """Let each packet between a host with a public address and the internet travel that much longer, each way."""
        ip = PUBLIC_HOSTS.get(host) or PRIVATE_HOSTS[host][0]
        end, wire = f"to_{host}", f"wire_{host}"
        lines = [
            f"ip netns add {wire}",
            f"ip -n internet link set {end} netns {wire}",
            f"ip -n {wire} link set {end} up",
            f"ip link add {end} netns internet type veth peer name far netns {wire}",
            f"ip -n {wire} link set far up",
            f"ip -n internet addr add {_first_of(ip)}/24 dev {end}",
            f"ip -n internet link set {end} up",
        ]
        await trio.run_process([*self._enter, "sh", "-ec", "\n".join(lines)])
        command = [*self.under(wire), sys.executable, str(_DELAYING_WIRE), str(delay_ms), end, "far"]
        process = await trio.lowlevel.open_process(command)
        try:
            yield
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    async def can_connect(self, host: str, ip: str, port: int) -> bool:
        """Whether a plain TCP connection succeeds."""
        code = f"import socket; socket.create_connection(({ip!r}, {port}), timeout=1.5)"
        try:
            await self.run(host, sys.executable, "-c", code)
        except subprocess.CalledProcessError:
            return False
        return True


_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--mount", "--kill-child")


@asynccontextmanager
async def open_lab() -> AsyncIterator[NetLab]:
    """The lab, until the block ends. Raises RuntimeError if it cannot be made."""
    script = f"{_setup()}\necho ready\nexec cat > /dev/null"
    holder = await trio.lowlevel.open_process(
        [*_UNSHARE, "sh", "-ec", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stderr is not None
        with trio.fail_after(SETUP_S):
            if not (await holder.stdout.receive_some()).startswith(b"ready"):
                raise RuntimeError((await holder.stderr.receive_some()).decode())
        yield NetLab(holder.pid)
    finally:
        holder.kill()
        with trio.CancelScope(shield=True):
            await holder.wait()


def _setup() -> str:
    """The script that makes the namespaces, links, routes and rules; sh runs it as root of its own user namespace."""
    lines = ["mount -t tmpfs tmpfs /run", "mkdir /run/netns"]
    hosts = [*PUBLIC_HOSTS, *PRIVATE_HOSTS, *(host for _, inside in PRIVATE_HOSTS.values() for host in inside)]
    for name in ("internet", *hosts):
        lines += [f"ip netns add {name}", f"ip -n {name} link set lo up"]
    lines += _forwarding("internet")
    for name, ip in [*PUBLIC_HOSTS.items(), *((name, ip) for name, (ip, _) in PRIVATE_HOSTS.items())]:
        lines += _link("internet", f"to_{name}", _first_of(ip), name, "out", ip)
    for router, (_, inside) in PRIVATE_HOSTS.items():
        lines += [
            f"ip -n {router} link add in type bridge",
            f"ip -n {router} addr add {_first_of(next(iter(inside.values())))}/24 dev in",
            f"ip -n {router} link set in up",
            *_forwarding(router),
            f"ip netns exec {router} nft -f - <<'END'\n{_NAT_RULES}\nEND",
        ]
        for host, ip in inside.items():
            lines += _link(router, f"to_{host}", None, host, "out", ip)
            lines += [f"ip -n {router} link set to_{host} master in"]
    return "\n".join(lines)


def _link(at: str, end: str, end_ip: str | None, host: str, interface: str, ip: str) -> Sequence[str]:
    """A cable from one namespace to a host, which is the host's way out."""
    return [
        f"ip link add {end} netns {at} type veth peer name {interface} netns {host}",
        *([f"ip -n {at} addr add {end_ip}/24 dev {end}"] if end_ip else []),
        f"ip -n {at} link set {end} up",
        f"ip -n {host} addr add {ip}/24 dev {interface}",
        f"ip -n {host} link set {interface} up",
        f"ip -n {host} route add default via {_first_of(ip)}",
    ]


def _forwarding(name: str) -> Sequence[str]:
    return [f"ip netns exec {name} sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'"]


def _first_of(ip: str) -> str:
    return ip.rsplit(".", 1)[0] + ".1"
