"""Where a daemon's socket lies unless somebody chose another place."""

from __future__ import annotations

import os
from pathlib import Path


def default_socket_path() -> Path:
    """`$XDG_RUNTIME_DIR/peerd.sock`, else `/tmp/peerd-UID/peerd.sock`."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime):
        return Path(runtime) / "peerd.sock"
    return own_folder() / "peerd.sock"


def own_folder() -> Path:
    """A folder of this user's in /tmp. It need not be there, and its owner must be looked at."""
    return Path(f"/tmp/peerd-{os.getuid()}")
