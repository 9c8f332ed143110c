"""The options of a daemon, and which of them may be used together."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peerd.cli.options.api import api_options, offered
from peerd.cli.options.parsing import at_revision, parse_address, parse_blocks, parse_named_model, parse_probability
from peerd.cli.options.relay import relay_options, relaying
from peerd.cli.options.rules import ApiOptions, DaemonOptions, ServingOptions, broken_rule
from peerd.cli.options.serving import serving_options, spec_of
from peerd.cli.options.shared import Command, JoinOptions, disk_option, join_options, revision_option
from peerd.local.profile import default_identity
from peerd.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from peerd.cli.daemon import Daemon
    from peerd.compute.audits.thresholds import Thresholds

# Of a server that serves while nobody else uses the machine. Niced time also tells it from its owner's programs.
IDLE_NICE = 10

_OPTIONS = (
    click.option(
        "--serve-blocks",
        type=parse_blocks,
        metavar="A:B|N|auto",
        help="Serve blocks A to B-1 of --model; or N blocks; or all that fit into free memory. Without A:B the swarm"
        " decides which, now and later: see --no-move.",
    ),
    click.option(
        "--no-move",
        "stay",
        is_flag=True,
        help="With --serve-blocks N or auto: keep the first choice of blocks. Otherwise the server"
        " ends its sessions and moves when other blocks need servers much more.",
    ),
    click.option(
        "--look-every",
        "look_every_s",
        type=click.FloatRange(min=1),
        metavar="SECONDS",
        help="With --serve-blocks N or auto: check this often whether to move. Default: 300, varied by half.",
    ),
    click.option(
        "--model",
        "models",
        type=parse_named_model,
        multiple=True,
        metavar="[NAME=]MODEL",
        help="A model's directory, a .gguf file, or org/name[@revision] on the hub (org/name:Q4_K_M or"
        " org/name/file.gguf for a GGUF file there): the one to serve, or one that"
        " the local API offers as NAME. Repeat it for several.",
    ),
    click.option(
        "--models",
        "among",
        multiple=True,
        metavar="PATTERN",
        help="Instead of --model, with --serve-blocks N or auto: serve whichever model needs it most, of those that the"
        " swarm serves and that a pattern allows: org/name on the hub, where * and ? stand for anything, or paths of"
        " models on this machine. Repeat it for several.",
    ),
    revision_option,
    disk_option,
    api_options,
    join_options,
    click.option(
        "--audit",
        type=parse_probability,
        metavar="off|P",
        help="Of the answers that programs on this machine get, have other servers compute a share of P again, to find"
        " servers that compute something else; those servers then see the answer too. Default: 1/50, and off with"
        " --swarm-key.",
    ),
    click.option(
        "--audit-limits",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="How far apart honest servers may be, as peerd calibrate MODEL printed it. Default: peerd's own table.",
    ),
    click.option(
        "--listen",
        type=parse_address,
        multiple=True,
        metavar="MULTIADDR",
        help="Where to listen; port 0 is any free one. Repeat it for several. Default for a server:"
        " /ip4/0.0.0.0/tcp/0/ws.",
    ),
    click.option(
        "--announce",
        type=parse_address,
        multiple=True,
        metavar="MULTIADDR",
        help="Announce this address instead of those of --listen, for forwarded ports and proxies. Repeat it for"
        " several.",
    ),
    click.option(
        "--identity",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="The file with this peer's key; created if it is missing. Each daemon needs its own. The files that the"
        " peer keeps across restarts lie beside it. Default: in the state directory.",
    ),
    click.option(
        "--no-mdns",
        is_flag=True,
        help="Neither look for peers in the local network nor be found there, by multicast DNS.",
    ),
    serving_options,
    relay_options,
    click.option("--stop-on-eof", is_flag=True, help="Stop when standard input ends: for programs that start peers."),
)


def daemon_options(command: Command) -> Command:
    """Add all options of a daemon to a command; `daemon_of` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def parsed(joining: JoinOptions, given: dict[str, Any]) -> DaemonOptions:
    """The options of a daemon, as click gives them, grouped. Raises click.UsageError where they do not fit."""
    relay = relaying(given)
    if given["open_page"] and given["http"] is None:
        given["http"] = ("127.0.0.1", 0)
    serving = ServingOptions(**_take(ServingOptions, given))
    api = ApiOptions(**_take(ApiOptions, given))
    options = DaemonOptions(joining=joining, relay=relay, serving=serving, api=api, **given)
    if (message := broken_rule(options)) is not None:
        raise click.UsageError(message)
    return options


def _take(group: type, given: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a group out of what was given."""
    return {each.name: given.pop(each.name) for each in fields(group)}


def daemon_of(joining: JoinOptions, given: dict[str, Any]) -> Daemon:
    """The daemon that the options ask for together. Raises click.UsageError where they do not fit each other."""
    options = parsed(joining, given)
    models = tuple((name, at_revision(model, options.revision)) for name, model in options.models)
    from peerd.cli.daemon import Daemon
    from peerd.client.audits.policy import AuditPolicy
    from peerd.discovery.mdns import open_zeroconf
    from peerd.peer import DEFAULT_LISTEN
    from peerd.peer_parts import PeerConfig

    identity_file = options.identity or default_identity()
    specs = (spec_of(options, models[0][1] if models else "", identity_file),) if options.serves else ()
    audit = AuditPolicy.of(options.audit, is_private=joining.swarm_key is not None)
    if options.audit_limits is not None:
        audit = replace(audit, thresholds=_read_thresholds(options.audit_limits))
    return Daemon(
        identity_file=identity_file,
        config=PeerConfig(
            listen=options.listen or ((DEFAULT_LISTEN,) if options.serves else ()),
            announce=options.announce,
            bootstrap=joining.bootstrap,
            swarm_key=joining.swarm_key,
            rules=joining.rules,
            audit=audit,
            serve=specs,
            relay=options.relay,
            may_be_relayed=joining.may_be_relayed,
            may_punch=joining.may_punch,
            multicast=open_zeroconf if options.meets_neighbours else None,
        ),
        stop_on_eof=options.stop_on_eof,
        disk_bytes=options.disk_bytes,
        idle_only=options.serving.idle_only,
        nice=nice if (nice := options.serving.nice) is not None else IDLE_NICE if options.serving.idle_only else 0,
        offer=offered(options.api, models) if options.api.is_offered else None,
    )


def _read_thresholds(path: Path) -> Thresholds:
    """Raises InvalidRequest for a file that `peerd calibrate` did not make."""
    from peerd.compute.audits.thresholds import Thresholds

    try:
        return Thresholds.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be used for --audit-limits, peerd calibrate makes it: {error}") from None
