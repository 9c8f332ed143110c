"""`RemoteModelForCausalLM`: a Transformers model whose decoder layers run on a swarm.

The object is the architecture's own class (`isinstance(model, LlamaForCausalLM)`) with its own head and forward. Only
its list of layers and some hooks are ours, so that `generate`, `Trainer`, peft and pipelines find what they know, for
every family that peerd serves.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from peerd.compute.model.head import HeadModel, load_head_model
from peerd.facade.backend import Prompts
from peerd.facade.blocks import Call, RemoteBlocks, during, make_remote
from peerd.facade.bridge import Bridge
from peerd.facade.cache import RemoteCache
from peerd.facade.calls import watch_calls
from peerd.facade.opening import open_swarm
from peerd.facade.steps import ROLLBACK
from peerd.facade.swarm import Swarm
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ContextTooLong

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.compute.families.family import Family

Address = Multiaddr | str
TUNING_MODES = ("ptune", "deep_ptune")
_TRAINED_FILE = "trained.safetensors"
# Remote blocks see no masks, but some decoders compute with the one that they make: they get a mask of one element.
_NO_MASKS = "peerd_remote"


class RemotePreTrainedModel:
    """What all remote models share: a mixin of the architecture's class. `from_pretrained` makes objects of both."""

    #: Set on each instance: what its blocks call.
    swarm: Swarm
    _closes: tuple[Callable[[], None], ...]

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        bootstrap: Address | Sequence[Address] = (),
        revision: str | None = None,
        device: str | torch.device = "cpu",
        tuning_mode: str | None = None,
        pre_seq_len: int = 0,
        **options: Any,
    ) -> Self:
        """Open a model of a swarm: a directory, a GGUF file or a hub id, of which only the head is loaded.

        bootstrap: addresses of peers of the swarm. device: where the head lies. tuning_mode: `ptune` trains
        `pre_seq_len` positions before each row, `deep_ptune` also what is added to them in every block. Other options
        are those of `peerd.open_peer`, such as `swarm_key`, `rules` and `hub`.

        Close the model when it is no longer needed, or use it in a `with` block; a forgotten one closes itself. Raises
        CheckpointError, UnsupportedModel, ValueError, OSError.
        """
        if tuning_mode is not None and tuning_mode not in TUNING_MODES:
            raise ValueError(f"tuning_mode={tuning_mode!r}: it is one of {', '.join(TUNING_MODES)}, or left out")
        if (tuning_mode is not None) != (pre_seq_len > 0):
            raise ValueError("tuning_mode and pre_seq_len belong together: give both, pre_seq_len at least 1, or none")
        device = torch.device(device)
        built: list[tuple[HeadModel, Family]] = []

        def build(checkpoint: Checkpoint) -> None:
            built.append((cls._load_head(checkpoint, device), checkpoint.family))

        bridge = Bridge()
        addresses = [bootstrap] if isinstance(bootstrap, str | Multiaddr) else list(bootstrap)
        try:
            blocks, close = bridge.hold(open_swarm(model, revision, addresses, options, build))
            head, family = built.pop()
            made: Any = head.model
            made._connect(head, family, Swarm(bridge, blocks), (close, bridge.close))
        except BaseException:
            bridge.close()
            raise
        weakref.finalize(made, bridge.stop).atexit = False
        made.name_or_path = made.config._name_or_path = str(model)
        if tuning_mode is not None:
            facts = blocks.facts
            prompts = Prompts(facts.block_count, pre_seq_len, facts.width, deep=tuning_mode == "deep_ptune")
            made.prompts = made.swarm.prompts = prompts.to(device)
        result: Self = made
        return result

    @classmethod
    def _load_head(cls, checkpoint: Checkpoint, device: torch.device) -> HeadModel:
        raise TypeError(f"{cls.__name__} is a mixin: call from_pretrained of one of the RemoteModelFor... classes")

    def _connect(self, head: HeadModel, family: Family, swarm: Swarm, closes: tuple[Callable[[], None], ...]) -> None:
        """Give the model, which has a head and no layers, its remote blocks."""
        me: Any = self
        layers = make_remote(head.layers, swarm)
        setattr(head.decoder, family.layers, layers)
        swarm.layers = list(layers)
        # Not as submodules, which would be named twice, nor through nn.Module's __setattr__.
        object.__setattr__(self, "swarm", swarm)
        object.__setattr__(self, "_closes", closes)
        me.requires_grad_(False)
        for parameter in self._trained_from_the_start():
            parameter.requires_grad_(True)
        watch_calls(self, head.decoder, family.layers)
        _register_no_masks()
        me.config._attn_implementation = _NO_MASKS
        _find_return_type(head.decoder, layers, family)

    def _trained_from_the_start(self) -> Sequence[nn.Parameter]:
        return ()

    # What Transformers calls.

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Have the cache that `generate` makes become a remote one, with sessions of the length that it will need."""
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={implementation!r}: servers hold keys and values in their own way; leave it out"
            )
        longest = generation_config.max_length or 0
        if longest > self.swarm.max_length:
            raise ContextTooLong(
                f"{longest} positions wanted (prompt and answer together), {self.swarm.blocks.facts.name} takes"
                f" {self.swarm.max_length}: shorten the prompt or max_new_tokens"
            )
        if self.swarm.prompts is not None and self.swarm.prompts.deep is not None:
            # Sessions have no deep prompts: each token is computed from the whole text, as with `use_cache=False`.
            generation_config.use_cache = model_kwargs["use_cache"] = False
            return
        parent: Any = super()
        parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        for name in ("cache", "past_key_values"):
            cache = model_kwargs.get(name)
            if cache is None:
                continue
            mode = str(kwargs.get("generation_mode", args[0] if args else "")).lower()
            # Assisted generation takes wrong candidates back, and a caller who owns the cache may go back in it.
            goes_back = getattr(cache, "_is_user_defined", False) or "assist" in mode or generation_config.is_assistant
            if not isinstance(cache, RemoteCache):
                rollback = ROLLBACK if goes_back else 0
                RemoteCache.adopt(cache, len(self.swarm.layers), max_length=longest, max_rollback=rollback)
            cache.max_length = max(cache.max_length, longest)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Save what was trained here (prompts, a classification head), as `trained.safetensors`, and the configuration.

        Raises ValueError where nothing was. LoRA weights are peft's to save: call `save_pretrained` of the PeftModel.
        """
        from safetensors.torch import save_file

        me: Any = self
        trained = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in me.named_parameters()
            if parameter.requires_grad
        }
        if not trained:
            raise ValueError("nothing was trained here: the weights of a remote model are on the servers of its swarm")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        facts = self.swarm.blocks.facts
        described = {"base_model": str(me.name_or_path), "model_digest": facts.digest.hex(), "format": "pt"}
        save_file(trained, folder / _TRAINED_FILE, metadata=described)
        me.config.save_pretrained(folder)

    def load_trained(self, directory: str | Path) -> None:
        """Read what `save_pretrained` saved. Raises ValueError where it belongs to another model or does not fit."""
        from safetensors import safe_open

        me: Any = self
        path = Path(directory) / _TRAINED_FILE
        with safe_open(path, framework="pt") as file:
            saved = (file.metadata() or {}).get("model_digest")
            if saved != self.swarm.blocks.facts.digest.hex():
                raise ValueError(f"{path} was trained for another model (digest {saved}): load that model instead")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        own = {name: parameter for name, parameter in me.named_parameters() if parameter.requires_grad}
        if tensors.keys() != own.keys():
            names = ", ".join(sorted(tensors.keys() ^ own.keys()))
            raise ValueError(f"{path} does not fit this model, which differs in {names}: use the same tuning_mode")
        with torch.no_grad():
            for name, tensor in tensors.items():
                if own[name].shape != tensor.shape:
                    raise ValueError(f"{path}: {name} is {list(tensor.shape)}, here {list(own[name].shape)}")
                own[name].copy_(tensor)

    def __reduce_ex__(self, _: Any) -> Any:
        raise TypeError("a remote model is a connection to a swarm: it cannot be copied or pickled. Open another one")

    def __deepcopy__(self, _: Any) -> Any:
        raise TypeError("a remote model is a connection to a swarm: it cannot be copied or pickled. Open another one")

    # Ends.

    def close(self) -> None:
        """Leave the swarm. Sessions of the model's caches end on every server."""
        for close in self._closes:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RemoteModel(RemotePreTrainedModel):
    """The model without a head on top, such as `LlamaModel`: token ids in, hidden states out."""

    @classmethod
    def _load_head(cls, checkpoint: Checkpoint, device: torch.device) -> HeadModel:
        kind = _remote_type(cls, checkpoint.family.decoder_type())
        return load_head_model(checkpoint, device=device, causal_type=kind, fill_head=lambda model, decoder: None)


class RemoteModelForCausalLM(RemotePreTrainedModel):
    """A causal language model: `generate`, `forward` with `labels`, gradients, peft. See `from_pretrained`."""

    @classmethod
    def _load_head(cls, checkpoint: Checkpoint, device: torch.device) -> HeadModel:
        kind = _remote_type(cls, checkpoint.family.causal_type())
        head = load_head_model(checkpoint, device=device, causal_type=kind)
        generation: Any = checkpoint.generation_config
        head.model.generation_config = generation
        return head


class RemoteModelForSequenceClassification(RemotePreTrainedModel):
    """A classifier over the last real position. Its head `score`, `num_labels` wide, is new and trained here."""

    @classmethod
    def from_pretrained(cls, model: str | Path, *, num_labels: int = 2, **options: Any) -> Self:
        """As for the other remote models; `num_labels` is the number of classes."""
        kind: Any = type(cls.__name__, (cls,), {"__module__": cls.__module__, "_num_labels": num_labels})
        made: Any = super(RemoteModelForSequenceClassification, kind).from_pretrained(model, **options)
        result: Self = made
        return result

    _num_labels = 2

    @classmethod
    def _load_head(cls, checkpoint: Checkpoint, device: torch.device) -> HeadModel:
        from transformers import AutoModelForSequenceClassification

        mapping: Any = AutoModelForSequenceClassification._model_mapping
        config = checkpoint.config
        if type(config) not in mapping:
            raise ValueError(f"Transformers has no sequence classification for {config.model_type}")
        config.num_labels = cls._num_labels
        kind = _remote_type(RemoteModelForSequenceClassification, mapping[type(config)])

        def make_score(model: Any, decoder: Any) -> None:
            width, labels = model.score.in_features, cls._num_labels
            bias = model.score.bias is not None
            model.score = nn.Linear(width, labels, bias=bias, device=device, dtype=checkpoint.dtype)
            nn.init.normal_(model.score.weight, std=getattr(config, "initializer_range", 0.02))

        return load_head_model(checkpoint, device=device, causal_type=kind, fill_head=make_score)

    def _trained_from_the_start(self) -> Sequence[nn.Parameter]:
        me: Any = self
        return list(me.score.parameters())


class AutoModelForCausalLM:
    """Transformers' door of the same name, onto a swarm."""

    def __init__(self) -> None:
        raise TypeError("call AutoModelForCausalLM.from_pretrained(model, bootstrap=[...])")

    @staticmethod
    def from_pretrained(model: str | Path, **options: Any) -> RemoteModelForCausalLM:
        """As for `RemoteModelForCausalLM.from_pretrained`."""
        return RemoteModelForCausalLM.from_pretrained(model, **options)


_TYPES: dict[tuple[type, type], type[Any]] = {}


def _remote_type(mixin: type, kind: type) -> type[Any]:
    """The architecture's class with remote blocks, under its own name, by which libraries know it."""
    if (mixin, kind) not in _TYPES:
        body = {"__module__": kind.__module__}
        if hasattr(kind, "prepare_inputs_for_generation"):
            body["prepare_inputs_for_generation"] = _named_as_peft_knows(kind.prepare_inputs_for_generation)
        _TYPES[mixin, kind] = type(kind.__name__, (mixin, kind), body)
    return _TYPES[mixin, kind]


def _named_as_peft_knows(original: Any) -> Any:
    """`prepare_inputs_for_generation` for a model that peft may wrap.

    peft 0.21 puts a method of its own in its place and knows the cache only as `past_key_values`: without it, peft
    would give its prompts again with every token. The causal model's pre-hook names the cache back.
    """

    # Transformers reads the signature.
    @functools.wraps(original)
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = original(self, *args, **kwargs)
        if "prepare_inputs_for_generation" in self.__dict__ and "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    return prepare_inputs_for_generation


def _register_no_masks() -> None:
    from transformers import AttentionMaskInterface

    AttentionMaskInterface.register(_NO_MASKS, _one_element_mask)


def _one_element_mask(*_: Any, **__: Any) -> torch.Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.bool)


def _find_return_type(decoder: Any, layers: RemoteBlocks, family: Family) -> None:
    """Find out whether the decoder's loop expects tuples of its layers, by a run with layers that do nothing.

    Five families of 94 do, and a release may change that, so they are asked instead of listed. Raises TypeError.
    """
    ids = torch.zeros(2, 3, dtype=torch.long, device=getattr(decoder, family.embeddings).weight.device)
    failure: Exception | None = None
    for returns_tuple in (False, True):
        blocks: list[Any] = list(layers)
        for block in blocks:
            block.returns_tuple = returns_tuple
        try:
            with during(Call((), is_dry=True)), torch.no_grad():
                output = type(decoder).forward(decoder, input_ids=ids, use_cache=False)
            if output.last_hidden_state.shape[:2] == ids.shape:
                return
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            failure = error
    raise TypeError(f"{type(decoder).__name__} calls its layers in a way that remote blocks do not know") from failure
