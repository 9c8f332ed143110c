"""All differences between the releases of Transformers that peerd supports, in one place.

Other modules use peerd's own names; this module finds out how the installed release spells them. It looks at
signatures and methods of the installed release where it can, so that no table of versions is needed.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from types import ModuleType
from typing import Any

from packaging.version import Version

# The whole test suite passed with these releases: the oldest that pyproject.toml allows, and the newest so far.
OLDEST_TESTED = "5.18"
NEWEST_TESTED = "5.24"

# The KV cache's name in calls of models, attention modules and mixers. Since 5.24 it is `cache`; there the others, of
# which the last is Mamba's, give a warning, and 5.40 is to remove them.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")

# Arguments that attention modules pass to every attention function and that ours does not need: the engine and the
# block's kind determine positions and windows, a frozen decoder has no dropout, and nothing reads the optional outputs.
_NEEDLESS = frozenset(
    ("dropout", "output_attentions", "output_router_logits", "position_ids", "sliding_window", "use_cache")
)


def import_quietly(module: str) -> ModuleType:
    """Import a module of Transformers without the DeprecationWarnings that its import causes.

    They are about how Transformers itself uses other packages (5.18 compiles parts of some models with
    `torch.jit.script`). No user of peerd can change that, and where warnings are errors the model would be unusable.
    """
    if module in sys.modules:
        return sys.modules[module]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(module)


def older_than(release: str) -> bool:
    """Whether the installed Transformers is older than this release."""
    return Version(version("transformers")) < Version(release)


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the KV cache argument of `forward` (of a model, block or attention module). TypeError if it has
    none.
    """
    parameters = inspect.signature(forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise TypeError(f"{forward.__qualname__} takes no KV cache: none of its arguments is {' or '.join(CACHE_NAMES)}")


def take_cache(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments that a block gave its attention module; None if it gave none.

    Raises TypeError for an unknown name: to drop an argument in silence would compute something else than the model.
    """
    if unknown := arguments.keys() - set(CACHE_NAMES):
        raise TypeError(f"this release of Transformers passes {', '.join(sorted(unknown))}, which peerd does not know")
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Raise TypeError if an attention module asks its attention function for what peerd does not know.

    `arguments` are those that the function does not name. None is Transformers' word for one that is not set.
    """
    if arguments.keys() <= _NEEDLESS:
        return
    unknown = sorted(name for name, value in arguments.items() if value is not None and name not in _NEEDLESS)
    if unknown:
        raise TypeError(f"this release of Transformers passes {', '.join(unknown)}, which peerd does not know")


def alibi_slopes(heads: int, device: Any) -> Any:
    """BLOOM's slopes of ALiBi, fp32 `[heads]`: the values of its bias at position 1.

    Transformers has a function for the slopes alone only since 5.21, and it is private.
    """
    import torch
    from transformers.models.bloom import modeling_bloom

    bloom: Any = modeling_bloom
    return bloom.build_alibi_tensor(torch.ones(1, 2, device=device), heads, torch.float32)[:, 0, 1]


def gguf_tables() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """For each of GGUF's architectures: metadata key -> field of the configuration, and the fields' defaults.

    Both tables belong to Transformers' first GGUF reader.
    """
    from transformers.integrations import ggml

    tables: Any = ggml
    return tables.GGUF_CONFIG_MAPPING, tables.GGUF_CONFIG_DEFAULTS_MAPPING


def gguf_reader() -> Any:
    """Transformers' first GGUF reader, for its tensor processors.

    5.24 has a second reader beside it, which keeps tensors packed and has no such processors.
    """
    from transformers import modeling_gguf_pytorch_utils

    return modeling_gguf_pytorch_utils


def causal_models() -> Mapping[str, Any]:
    """The configuration class of every causal language model that the installed release has, by `model_type`."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {name: CONFIG_MAPPING[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def before_newest_tested() -> bool:
    """Whether the installed release is older than the newest that peerd was tested with."""
    return _minor(version("transformers")) < Version(NEWEST_TESTED)


def untested_release() -> str | None:
    """A one-line warning if the installed minor release lies outside the tested range; None inside it."""
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
