"""The default path of a daemon's socket."""

from __future__ import annotations

import os
from pathlib import Path

from peerd.local.profile import profile


def default_socket_path() -> Path:
    """`$XDG_RUNTIME_DIR/peerd.sock`, else `/tmp/peerd-UID/peerd.sock`; of a profile `peerd-NAME.sock`."""
    name = f"peerd-{profile()}.sock" if profile() else "peerd.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime):
        return Path(runtime) / name
    return own_folder() / name


def own_folder() -> Path:
    """The path of this user's folder in /tmp. It may not exist, and its owner must be checked."""
    return Path(f"/tmp/peerd-{os.getuid()}")
