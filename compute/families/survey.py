"""Lists the causal language models of the installed Transformers that the family table does not mention.

`make families` prints the list. It is work to do when a new release of Transformers is adopted, not a failure: peerd
refuses a family that is not in the table, and the error gives its name.
"""

from __future__ import annotations

from typing import Any

from peerd.compute.families.lookup import FAMILIES
from peerd.compute.families.refused import REFUSED
from peerd.compute.transformers_compat import causal_models


def unknown_architectures() -> list[str]:
    """The names, sorted, of architectures whose language model is neither served nor refused with a reason."""
    known = FAMILIES.keys() | REFUSED.keys()
    return sorted(name for name, kind in causal_models().items() if not known & _text_models(kind))


def _text_models(kind: Any) -> set[str]:
    """The `model_type` that a configuration of this kind may have, and that of the language model inside it."""
    if kind.model_type in FAMILIES or kind.model_type in REFUSED:
        return {kind.model_type}
    return {kind.model_type, kind().get_text_config().model_type}


def main() -> None:
    """Print the unknown architectures, one a line."""
    from transformers import __version__

    unknown = unknown_architectures()
    print(f"Transformers {__version__}: {len(FAMILIES)} families served, {len(REFUSED)} refused with a reason")
    print(f"{len(unknown)} not looked at yet" + (":" if unknown else ""))
    for name in unknown:
        print(f"  {name}")


if __name__ == "__main__":
    main()
