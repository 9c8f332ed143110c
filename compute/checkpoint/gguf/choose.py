"""Chooses a GGUF file among those of a repository, by its path or by how it is quantized."""

from __future__ import annotations

import re
from collections.abc import Collection

from peerd.compute.checkpoint.gguf.split import first_part
from peerd.compute.errors import CheckpointError

# Beside the models: towers for images and sound, and statistics for quantizing.
_NO_MODEL = re.compile(r"(mmproj|imatrix)", re.IGNORECASE)
# The ways of quantizing that names of files end with, such as Q4_K_M, IQ2_XXS, UD-Q4_K_XL, BF16 and MXFP4.
_KIND = re.compile(r"(?:UD-)?(?:I?Q\d\w*|TQ\d\w*|B?F16|F32|MXFP4\w*)", re.IGNORECASE)


def choose_gguf(names: Collection[str], wanted: str, where: object) -> str:
    """The file to open: for a model in several parts the first.

    `wanted` is a path in the repository, or a part of the name such as `Q4_K_M`. Raises CheckpointError, which lists
    what there is, if there is no such file or more than one.
    """
    models = sorted({first_part(name) for name in names if name.endswith(".gguf") and not _NO_MODEL.search(name)})
    if wanted.endswith(".gguf"):
        if wanted in names:
            return first_part(wanted)
        raise CheckpointError(f"{where}: there is no such file; there is {_listed(models)}")
    word = re.compile(rf"(?<![^\W_]){re.escape(wanted)}(?!\w)", re.IGNORECASE)
    found = [name for name in models if word.search(name.rpartition("/")[2].removesuffix(".gguf"))]
    # `Q4_K_XL` is found as UD-Q4_K_XL too, unless there is one of that very name.
    found = [name for name in found if not re.search(rf"UD-{re.escape(wanted)}", name, re.IGNORECASE)] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{where}: {len(found)} files are called so; name one of them: {_listed(found)}")
    raise CheckpointError(f"{where}: no GGUF file is called so; there is {_listed(models)}")


def gguf_kinds(names: Collection[str]) -> list[str]:
    """The ways of quantizing that a repository's GGUF files name."""
    models = (name.removesuffix(".gguf") for name in names if name.endswith(".gguf") and not _NO_MODEL.search(name))
    stems = (re.sub(r"-\d{5}-of-\d{5}$", "", name) for name in models)
    ends = (re.split(r"[/.-]", stem.replace("UD-", "UD~"))[-1].replace("~", "-") for stem in stems)
    return sorted({end for end in ends if _KIND.fullmatch(end)})


def _listed(names: Collection[str], most: int = 12) -> str:
    shown = ", ".join(sorted(names)[:most])
    return (shown or "none") + (f" and {len(names) - most} more" if len(names) > most else "")
