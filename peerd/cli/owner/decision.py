"""Decides from signs of use whether the machine's owner needs it, and when to serve again. Pure; time is an argument.

To yield is cheap, for sessions go on elsewhere without losing a token, and to serve again costs an announcement. So a
use that lasts for two looks ends serving, and serving begins again only after minutes of quiet: somebody who reads what
is on the screen is still there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Between two looks. A program that starts should not have to share the machine for long.
LOOK_S = 10.0
# A use is one if it shows in this many looks in a row: a scheduled task of a second is none.
LOOKS_IN_USE = 2
# A user who is away for less than this may be back at once; screens usually lock after it.
QUIET_S = 300.0
# Input within this time is a user at the machine.
INPUT_S = 60.0
# Of all processor cores, how much others may use: more than background services take, and less than one program that
# computes on a machine of two or three cores.
CORES_SHARE = 0.25
# Of a GPU: a desktop that draws itself takes a few percent, a game or another computation most of it.
GPU_SHARE = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """What was seen of other programs and of users. None: it cannot be known on this machine.

    cores: of all processor cores, the share that others used since the last look, niced programs left out.
    gpu: the greatest share of one of our GPUs that others used. input_idle_s: seconds since a user's last input.
    """

    cores: float | None = None
    gpu: float | None = None
    input_idle_s: float | None = None


@dataclass(frozen=True, slots=True)
class Serving:
    """Whether we serve. uses: looks in a row that saw a use. quiet_since: since when none was seen; None after one.

    why: the use because of which we do not serve; "" while we do.
    """

    why: str = ""
    uses: int = 0
    quiet_since: float | None = None

    @property
    def may_serve(self) -> bool:
        return not self.why


def use_of(signs: Signs) -> str:
    """In words, the use that the signs show; "" for none."""
    if signs.input_idle_s is not None and signs.input_idle_s < INPUT_S:
        return "somebody is at the keyboard"
    if signs.gpu is not None and signs.gpu > GPU_SHARE:
        return f"other programs use {signs.gpu:.0%} of a GPU"
    if signs.cores is not None and signs.cores > CORES_SHARE:
        return f"other programs use {signs.cores:.0%} of the processor"
    return ""


def after(serving: Serving, signs: Signs, now: float) -> Serving:
    """Whether to serve after a look that saw these signs. `now`: seconds, of any clock that only advances."""
    use = use_of(signs)
    if not use:
        quiet_since = now if serving.quiet_since is None else serving.quiet_since
        if serving.may_serve or now - quiet_since >= QUIET_S:
            return Serving(quiet_since=quiet_since)
        return replace(serving, uses=0, quiet_since=quiet_since)
    uses = serving.uses + 1
    # While we do not serve, each use counts: quiet has to last.
    why = use if serving.why or uses >= LOOKS_IN_USE else ""
    return Serving(why, uses, None)
