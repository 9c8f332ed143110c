"""Saves what was trained beside remote blocks, puts it on a hub with a card, and reads it again.

Prompts and classification heads are written as `trained.safetensors`. LoRA that peft has put beside the blocks is
written as peft does it, so that peft loads it beside the whole model, and servers load it as an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from peerd.compute.adapters.base import ANY_BASE, TrainedFor
from peerd.compute.adapters.source import WEIGHTS_FILE
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.facade.sharing.adapters import Adapters
from peerd.facade.sharing.card import Base, card_of
from peerd.facade.sharing.trained import TrainedFile, read_trained, write_trained
from peerd.facade.swarm import Swarm

# peft's prefix before the model's own names, and the name that it gives an adapter that was given none.
_PEFT_PREFIX = "base_model.model."
_PEFT_DEFAULT = "default"


class Sharing:
    """Mixin of a remote model's class."""

    # Set on each instance. Transformers reads these hints when a class is made.
    swarm: Swarm
    _base: Base
    _hub: HubSettings
    _any_base: bool
    _adapters: Adapters

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configurations of the adapters that peft has put beside the blocks, by name; peft sets it."""
        configs = self._adapters.configs
        if configs is None:
            raise AttributeError("peft has put no adapter beside this model")
        return configs

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        me: Any = self
        self._adapters.set_configs(configs, me)

    @peft_config.deleter
    def peft_config(self) -> None:
        self._adapters.configs = None

    def save_pretrained(
        self, save_directory: str | Path, *, figures: Mapping[str, object] | None = None, **options: Any
    ) -> None:
        """Save what was trained here, with a card that names the base model, its digest and revision.

        Prompts and a classification head go into `trained.safetensors`; LoRA that peft put beside the blocks is saved
        in peft's format. `figures` are more rows of the card, such as `{"steps": 50, "final loss": 0.2}`. With
        `push_to_hub=True` and `repo_id`, it goes to the hub too. Raises ValueError where nothing was trained.
        """
        folder = Path(save_directory)
        if getattr(self, "peft_config", None):
            self._save_lora(folder, figures or {})
        else:
            self._save_trained(folder, figures or {})
        if options.get("push_to_hub"):
            self.push_to_hub(options.get("repo_id") or folder.name, figures=figures, token=options.get("token"))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        figures: Mapping[str, object] | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        **_: Any,
    ) -> str:
        """Put what `save_pretrained` saves into the repository, which is made if there is none; gives the commit's URL.

        The hub and its token are those of `hub=` or of the environment. Raises ValueError where nothing was trained,
        and huggingface_hub's errors.
        """
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._hub.endpoint, token=token or self._hub.token, library_name="peerd")
        with TemporaryDirectory(prefix="peerd-") as folder:
            self.save_pretrained(folder, figures=figures)
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            message = commit_message or f"Upload what was trained for {self._base.called}"
            done = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message)
        return str(done.commit_url)

    def load_trained(self, source: str | Path) -> None:
        """Read what `save_pretrained` saved: a directory, or a hub id.

        Raises ValueError where it belongs to another model and the model was not opened with `any_base=True`, and
        where it does not fit.
        """
        self._take(read_trained(source, self._hub))

    def _take(self, trained: TrainedFile) -> None:
        me: Any = self
        own = {name: parameter for name, parameter in me.named_parameters() if parameter.requires_grad}
        wrong = TrainedFor(trained.base_model, trained.digest).mismatch(self._base.digest)
        if wrong is not None and not self._any_base:
            raise ValueError(f"{trained.where} {wrong}: {ANY_BASE}")
        if trained.tensors.keys() != own.keys():
            names = ", ".join(sorted(trained.tensors.keys() ^ own.keys()))
            raise ValueError(
                f"{trained.where} does not fit this model, which differs in {names}: give it as `trained` to"
                " from_pretrained, which takes tuning_mode and num_labels from it"
            )
        with torch.no_grad():
            for name, tensor in trained.tensors.items():
                if own[name].shape != tensor.shape:
                    here = list(own[name].shape)
                    raise ValueError(f"{trained.where}: {name} is {list(tensor.shape)}, here {here}")
                own[name].copy_(tensor)

    def _save_trained(self, folder: Path, figures: Mapping[str, object]) -> None:
        me: Any = self
        trained = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in me.named_parameters()
            if parameter.requires_grad
        }
        if not trained:
            raise ValueError(
                "nothing was trained here: the weights of a remote model are on the servers of its swarm. What peft"
                " holds itself, such as PromptTuning's prompts, is saved by save_pretrained of the PeftModel"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_trained(folder, trained, self._base.metadata())
        me.config.save_pretrained(folder)
        has_prompts, has_head = "prompts.prefix" in trained, "score.weight" in trained
        kind = {(True, True): "Prompts and a classifier", (False, True): "A classifier"}
        usage = [
            "import peerd",
            "",
            f"model = peerd.{_class_of(self)}.from_pretrained(",
            f'    "{self._base.called}", bootstrap=[ADDRESS], trained="THIS REPOSITORY"',
            ")",
        ]
        title = kind.get((has_prompts, has_head), "Prompts")
        card = card_of(self._base, title, trained, usage, library="peerd", figures=figures)
        (folder / "README.md").write_text(card)

    def _save_lora(self, folder: Path, figures: Mapping[str, object]) -> None:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        me: Any = self
        for name, config in me.peft_config.items():
            where = folder if name == _PEFT_DEFAULT else folder / name
            where.mkdir(parents=True, exist_ok=True)
            found = get_peft_model_state_dict(me, adapter_name=name, save_embedding_layers=False)
            tensors = {f"{_PEFT_PREFIX}{key}": tensor.detach().cpu().contiguous() for key, tensor in found.items()}
            save_file(tensors, where / WEIGHTS_FILE, metadata={"format": "pt", **self._base.metadata()})
            described = copy.copy(config)
            described.base_model_name_or_path = self._base.called
            described.revision = self._base.revision or None
            described.inference_mode = True
            described.save_pretrained(where)
            usage = [
                "from peft import PeftModel",
                "",
                "import peerd",
                "",
                f'model = peerd.{_class_of(self)}.from_pretrained("{self._base.called}", bootstrap=[ADDRESS])',
                'model = PeftModel.from_pretrained(model, "THIS REPOSITORY")',
            ]
            card = card_of(self._base, "LoRA", tensors, usage, library="peft", figures=figures)
            (where / "README.md").write_text(card)


def _class_of(model: object) -> str:
    """The name of the remote class that a program opens such a model with."""
    return next(kind.__name__ for kind in type(model).__mro__ if kind.__module__ == "peerd.facade.model")
