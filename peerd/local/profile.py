"""Profiles: names under which several daemons of one user keep their files apart.

A profile has a configuration file, a key with its state, a token and a socket of its own; models and measurements are
shared. Without one the files have their usual places.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import platformdirs

#: The variable that names the profile of this process; `--profile` sets it.
VARIABLE = "PEERD_PROFILE"
# A part of the names of files and of a systemd unit.
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


def parse_profile(text: str) -> str:
    """The name of a profile. Raises ValueError for what cannot be one."""
    if _NAME.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no name of a profile: it has 1 to 32 of a-z, 0-9, - and _")
    return text


def profile() -> str:
    """The profile of this process; "" for none, and for a variable that holds no name."""
    name = os.environ.get(VARIABLE, "")
    return name if _NAME.fullmatch(name) else ""


def state_folder() -> Path:
    """Where the key, the state and the token lie, if no option names another place."""
    state = platformdirs.user_state_path("peerd")
    return state / "profiles" / profile() if profile() else state


def default_identity() -> Path:
    """The file with the daemon's key."""
    return state_folder() / "identity.key"


def default_token_file() -> Path:
    """The file with the token of the local API."""
    return state_folder() / "api.token"


def default_config_file() -> Path:
    """`$XDG_CONFIG_HOME/peerd/config.toml`, else in `~/.config`; of a profile `profiles/NAME.toml` beside it."""
    folder = platformdirs.user_config_path("peerd")
    return folder / "profiles" / f"{profile()}.toml" if profile() else folder / "config.toml"
