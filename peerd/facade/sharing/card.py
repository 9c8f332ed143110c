"""The card of what was trained beside a swarm's blocks: for which model, how well, and how it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Base:
    """The model that something was trained for. `hub_id` and `revision` are empty where it came from no hub."""

    name: str
    digest: str
    hub_id: str = ""
    revision: str = ""

    @property
    def called(self) -> str:
        """What others may know it by: never a path on this machine."""
        return self.hub_id or self.name

    def metadata(self) -> dict[str, str]:
        """What the weights file says of it."""
        return {"base_model": self.called, "model_digest": self.digest, "revision": self.revision}


def card_of(
    base: Base,
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    usage: Sequence[str],
    *,
    library: str,
    figures: Mapping[str, object],
) -> str:
    """The text of README.md. `kind`: what was trained, in words; `figures`: more rows, such as steps and final loss."""
    values = sum(tensor.numel() for tensor in tensors.values())
    rows = {
        "base model": base.called,
        "revision": f"`{base.revision}`" if base.revision else "",
        "model digest": f"`{base.digest}`",
        "trained values": f"{values:,} in {len(tensors)} tensors",
    } | {name: _cell(value) for name, value in figures.items()}
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items() if text)
    # A hub takes only its own models as base models.
    # The hub knows repositories; a GGUF file's path may follow.
    repo = "/".join(base.hub_id.split("/")[:2])
    head = [f"base_model: {json.dumps(repo)}"] if repo else []
    head += [f"library_name: {library}", f"tags: {json.dumps(['peerd', kind.lower()])}"]
    code = "\n".join(usage)
    return f"""---
{chr(10).join(head)}
---

# {kind} for {base.called}

Trained with peerd, through blocks that a swarm of peers served and nobody changed.

| | |
|---|---|
{table}

The model digest names the weights that it was trained beside. peerd refuses to load it beside others.

## Use

```python
{code}
```
"""


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
