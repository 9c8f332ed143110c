"""What changed between the releases of Transformers that peerd runs with, in one place.

The rest of the code speaks peerd's own words; this module asks the installed release how it spells them. Where a
release can be asked (a signature, a method that is there or not), it is asked, so that no table of versions is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from packaging.version import Version

# The releases that the whole test suite passed with: the oldest that pyproject.toml allows, and the newest so far.
OLDEST_TESTED = "5.18"
NEWEST_TESTED = "5.24"

# The KV cache's name in calls of models and attention modules. Since 5.24 it is `cache`; `past_key_values` warns there
# and is announced to go in 5.40.
CACHE_NAMES = ("cache", "past_key_values")


def cache_argument(forward: Callable[..., Any]) -> str:
    """How `forward` (of a model, block or attention module) calls its KV cache. Raises TypeError if it takes none."""
    parameters = inspect.signature(forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise TypeError(f"{forward.__qualname__} takes no KV cache: none of its arguments is {' or '.join(CACHE_NAMES)}")


def take_cache(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments that a block gave its attention module, None where it gave none.

    `arguments` may hold nothing else: raises TypeError for a name that is unknown here, because an argument that is
    dropped in silence computes something else than the model says.
    """
    if unknown := arguments.keys() - set(CACHE_NAMES):
        raise TypeError(f"this release of Transformers passes {', '.join(sorted(unknown))}, which peerd does not know")
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def before_newest_tested() -> bool:
    """Whether the installed release is older than the newest that peerd was tested with."""
    return _minor(version("transformers")) < Version(NEWEST_TESTED)


def untested_release() -> str | None:
    """A warning, one line, where the installed minor release lies outside the tested range; None inside it."""
    installed = version("transformers")
    if Version(OLDEST_TESTED) <= _minor(installed) <= Version(NEWEST_TESTED):
        return None
    return (
        f"Transformers {installed} was not tested with this peerd, which was tested with {OLDEST_TESTED} to "
        f"{NEWEST_TESTED}. Each span is checked when it is loaded; if a model is refused, install a tested release"
    )


def _minor(release: str) -> Version:
    parsed = Version(release)
    return Version(f"{parsed.major}.{parsed.minor}")
