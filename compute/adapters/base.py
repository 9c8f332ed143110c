"""Which model an adapter was trained for, as its files say, and whether that is the one beside which it is to stand.

An adapter's shapes fit every model of its architecture and size, so that only the digest tells two of them apart. peerd
writes it in two places: among the metadata of the weights file, and in the configuration's `auto_mapping`, which peft
takes over when it saves an adapter itself. Files that peft has written beside local models have none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: In a weights file's metadata, and in `auto_mapping` of peft's configuration.
METADATA_DIGEST = "model_digest"
CONFIG_DIGEST = "peerd_model_digest"
#: What to do about a mismatch, for errors: people do use adapters beside another quantization of the same model.
ANY_BASE = (
    "load it beside that model; or, where this is the same model in other files, allow it by any_base=True (--any-base)"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")
# A name comes from an untrusted file, and goes into an error.
_MAX_NAME = 200


@dataclass(frozen=True, slots=True)
class TrainedFor:
    """The model that something was trained for: its name, and its digest in hex. Empty where the files do not say."""

    name: str = ""
    digest: str = ""

    def mismatch(self, digest: str) -> str | None:
        """Why this does not belong to the model of that digest; None if it does, or if nobody knows."""
        if not self.digest or self.digest == digest:
            return None
        name = self.name or "of an unknown name"
        return f"was trained for another model, {name} (digest {self.digest[:16]}, this one has {digest[:16]})"


def trained_for(config: Mapping[str, Any], metadata: Mapping[str, str]) -> TrainedFor:
    """What peft's decoded configuration and the weights file's metadata say. Values of other types say nothing."""
    mapping = config.get("auto_mapping")
    noted = mapping.get(CONFIG_DIGEST) if isinstance(mapping, dict) else None
    digests = (each for each in (metadata.get(METADATA_DIGEST), noted) if isinstance(each, str))
    name = config.get("base_model_name_or_path")
    return TrainedFor(
        name[:_MAX_NAME] if isinstance(name, str) else "",
        next((each for each in digests if _DIGEST.fullmatch(each)), ""),
    )
