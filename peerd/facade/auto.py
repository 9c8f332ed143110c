"""Opens a causal model as the Auto classes do: ours by its name, Transformers' own by a directory that names a model.

    peerd.RemoteConfig(model="org/name", bootstrap=[ADDRESS]).save_pretrained("mine")
    transformers.AutoModelForCausalLM.from_pretrained("mine")

So a program that gets only a model's path can run on a swarm. It must first use the name `peerd.RemoteConfig`, which
registers the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from peerd.facade.model import RemoteModelForCausalLM


class RemoteConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The `config.json` of such a directory: arguments of `RemoteModelForCausalLM.from_pretrained`."""

    model_type = "peerd"

    def __init__(
        self,
        model: str | Path = "",
        bootstrap: str | Sequence[str] = (),
        revision: str | None = None,
        daemon: bool | str = False,
        **options: Any,
    ) -> None:
        self.model = str(model)
        self.bootstrap = [bootstrap] if isinstance(bootstrap, str) else [str(address) for address in bootstrap]
        self.revision = revision
        self.daemon = daemon
        super().__init__(**options)


class _Opens:
    """The class that AutoModelForCausalLM calls for such a configuration."""

    config_class = RemoteConfig

    @classmethod
    def from_pretrained(cls, path: str, *, config: RemoteConfig, **options: Any) -> RemoteModelForCausalLM:
        """Open the remote model that `config` names; `options` are those of `RemoteModelForCausalLM.from_pretrained`.

        Raises ValueError if the configuration names no model.
        """
        if not config.model:
            raise ValueError(f"{path}/config.json names no model: write it with peerd.RemoteConfig(model=...)")
        named = {"bootstrap": config.bootstrap, "revision": config.revision, "daemon": config.daemon}
        # Arguments that AutoModelForCausalLM adds.
        added = {"adapter_kwargs", "trust_remote_code"}
        wanted = {name: value for name, value in options.items() if name not in added and not name.startswith("_")}
        return RemoteModelForCausalLM.from_pretrained(config.model, **(named | wanted))


class AutoModelForCausalLM:
    """Like the class of that name in Transformers, but opens a model of a swarm."""

    def __init__(self) -> None:
        raise TypeError("call AutoModelForCausalLM.from_pretrained(model, bootstrap=[...])")

    @staticmethod
    def from_pretrained(model: str | Path, **options: Any) -> RemoteModelForCausalLM:
        """For the options see `RemoteModelForCausalLM.from_pretrained`."""
        return RemoteModelForCausalLM.from_pretrained(model, **options)


AutoConfig.register(RemoteConfig.model_type, RemoteConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(RemoteConfig, _Opens, exist_ok=True)
