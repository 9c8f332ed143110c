"""Transformers' AutoConfig and AutoModelForCausalLM open a directory that says which model of which swarm it means.

    peerd.RemoteConfig(model="org/name", bootstrap=[ADDRESS]).save_pretrained("mine")
    transformers.AutoModelForCausalLM.from_pretrained("mine")

So programs that know nothing but a model's path run on a swarm, once `peerd.RemoteConfig` has been named: that
registers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from peerd.facade.model import RemoteModelForCausalLM


class RemoteConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """`config.json` of such a directory: arguments of `RemoteModelForCausalLM.from_pretrained`."""

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
    """What the Auto class calls for such a configuration."""

    config_class = RemoteConfig

    @classmethod
    def from_pretrained(cls, path: str, *, config: RemoteConfig, **options: Any) -> RemoteModelForCausalLM:
        """The remote model that `config` names; `options` are those of `RemoteModelForCausalLM.from_pretrained`.

        Raises ValueError where the configuration names no model.
        """
        if not config.model:
            raise ValueError(f"{path}/config.json names no model: write it with peerd.RemoteConfig(model=...)")
        named = {"bootstrap": config.bootstrap, "revision": config.revision, "daemon": config.daemon}
        # What the Auto class adds of its own.
        added = {"adapter_kwargs", "trust_remote_code"}
        wanted = {name: value for name, value in options.items() if name not in added and not name.startswith("_")}
        return RemoteModelForCausalLM.from_pretrained(config.model, **(named | wanted))


AutoConfig.register(RemoteConfig.model_type, RemoteConfig, exist_ok=True)
AutoModelForCausalLM.register(RemoteConfig, _Opens, exist_ok=True)
