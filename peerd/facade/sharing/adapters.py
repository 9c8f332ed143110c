"""Refuses LoRA adapters that peft loads beside remote blocks although they were trained for another model.

peft knows a model's name and no digest. But it keeps a configuration for each adapter and saves it with the weights. So
each configuration is marked with the digest of the model beside which its adapter stands, and one that comes with
another model's mark is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from peerd.compute.adapters.base import ANY_BASE, CONFIG_DIGEST, trained_for
from peerd.facade.sharing.card import Base


class Adapters:
    """The adapters that peft has put beside one model. any_base: those of other models are taken too."""

    def __init__(self, base: Base, *, any_base: bool) -> None:
        self._digest, self._any_base = base.digest, any_base
        #: peft's own table, in which it puts adapters that are added later.
        self.configs: dict[str, Any] | None = None

    def set_configs(self, configs: dict[str, Any], model: nn.Module) -> None:
        """Take peft's table of configurations by adapters' names, once it has changed `model`.

        Raises ValueError for another model's adapter, and leaves the model without it.
        """
        before, self.configs = self.configs, configs
        for name in list(configs):
            try:
                self.check([name])
            except ValueError:
                del configs[name]
                _take_off(model, name)
                self.configs = before
                raise

    def check(self, names: Iterable[str]) -> None:
        """Mark the adapters of these names that have no mark. Raises ValueError for another model's adapter."""
        configs = self.configs or {}
        for name in names:
            if name in configs:
                configs[name] = self._marked(name, configs[name])

    def _marked(self, name: str, config: Any) -> Any:
        noted = getattr(config, "auto_mapping", None) or {}
        if CONFIG_DIGEST not in noted:
            # A copy, because a program may use its configuration for several models.
            marked = copy.copy(config)
            marked.auto_mapping = {**noted, CONFIG_DIGEST: self._digest}
            return marked
        known = {"base_model_name_or_path": config.base_model_name_or_path, "auto_mapping": noted}
        wrong = trained_for(known, {}).mismatch(self._digest)
        if wrong is not None and not self._any_base:
            raise ValueError(f"adapter {name!r} {wrong}: {ANY_BASE}")
        return config


def _take_off(model: nn.Module, adapter: str) -> None:
    """Undo what peft has done to the model for this adapter, whose weights it has not loaded yet."""
    for module in list(model.modules()):
        found: list[tuple[str, Any]] = list(module.named_children())
        for name, child in found:
            if hasattr(child, "base_layer") and adapter in getattr(child, "lora_A", ()):
                child.delete_adapter(adapter)
                if not child.lora_A:
                    setattr(module, name, child.base_layer)
            elif hasattr(child, "original_module") and adapter in getattr(child, "modules_to_save", ()):
                del child.modules_to_save[adapter]
                if not child.modules_to_save:
                    setattr(module, name, child.original_module)
