"""Imports that take long, off the event loop."""

from __future__ import annotations

import sys
from importlib import import_module

import trio


async def import_in_thread(*modules: str) -> None:
    """Import what brings torch along: it takes seconds, in which peers would think us dead."""
    for module in modules:
        if module not in sys.modules:
            await trio.to_thread.run_sync(import_module, module)
