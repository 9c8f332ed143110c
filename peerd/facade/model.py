"""`RemoteModelForCausalLM`: a Transformers model whose decoder layers run on a swarm.

The object has the architecture's own class (`isinstance(model, LlamaForCausalLM)`), with its own head and forward. Only
its list of layers and some hooks are ours. So `generate`, `Trainer`, peft and pipelines work as usual, for every family
that peerd serves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.model.head import HeadModel, load_head_model
from peerd.compute.transformers_compat import CACHE_NAMES
from peerd.facade.architecture import dtype_named, find_return_type, remote_type, use_no_masks
from peerd.facade.backend import Prompts
from peerd.facade.blocks import make_remote
from peerd.facade.bridge import Bridge
from peerd.facade.cache import RemoteCache
from peerd.facade.calls import watch_calls
from peerd.facade.opening import check_options, open_daemon, open_swarm, socket_of
from peerd.facade.sharing.adapters import Adapters
from peerd.facade.sharing.card import Base
from peerd.facade.sharing.saving import Sharing
from peerd.facade.sharing.trained import TrainedFile, classes_of, read_trained
from peerd.facade.steps import ROLLBACK
from peerd.facade.swarm import Swarm
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ContextTooLong

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.compute.families.family import Family

Address = Multiaddr | str
TUNING_MODES = ("ptune", "deep_ptune")


class RemotePreTrainedModel(Sharing):
    """The part that all remote models share: a mixin of the architecture's class. `from_pretrained` makes objects of
    both.
    """

    _closes: tuple[Callable[[], None], ...]

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        bootstrap: Address | Sequence[Address] = (),
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        daemon: bool | str | Path = False,
        tuning_mode: str | None = None,
        pre_seq_len: int = 0,
        trained: str | Path | None = None,
        any_base: bool = False,
        **options: Any,
    ) -> Self:
        """Open a model of a swarm: a directory, a GGUF file or a hub id, of which only the head is loaded.

        bootstrap: addresses of peers of the swarm.
        device, dtype: the device of the head, and what it computes in. dtype None, or "auto": the checkpoint's own.
            Blocks compute in the dtype with which their servers were started.
        tuning_mode: `ptune` trains `pre_seq_len` positions before each row; `deep_ptune` also trains values that are
            added to them in every block.
        trained: what `save_pretrained` saved, a directory or a hub id; it says tuning_mode and pre_seq_len itself.
        any_base: take prompts, heads and adapters that were trained for another model too, such as another
            quantization of this one.
        daemon: use the peer of the `peerd --client` on this machine instead of one of the model's own. True, or the
            path of its socket. The daemon was started with this model, and knows the swarm: give no `bootstrap`.
        Other options are those of `peerd.open_peer`, such as `swarm_key`, `rules` and `hub`.

        Close the model, or use it in a `with` block; a forgotten one closes itself. Raises CheckpointError,
        UnsupportedModelError, ValueError, TypeError, OSError; InvalidRequest where no such daemon runs.
        """
        hub = options.get("hub") or HubSettings()
        given = None if trained is None else read_trained(trained, hub)
        if given is not None and tuning_mode is None:
            tuning_mode, pre_seq_len = given.tuning
        if tuning_mode is not None and tuning_mode not in TUNING_MODES:
            raise ValueError(f"tuning_mode={tuning_mode!r}: it is one of {', '.join(TUNING_MODES)}, or left out")
        if (tuning_mode is not None) != (pre_seq_len > 0):
            raise ValueError("tuning_mode and pre_seq_len belong together: give both, pre_seq_len at least 1, or none")
        check_options(options)
        where, precision = torch.device(device), dtype_named(dtype)
        built: list[tuple[HeadModel, Family, Base]] = []

        def build(checkpoint: Checkpoint) -> None:
            base = Base(checkpoint.name, checkpoint.model_digest.hex(), checkpoint.hub_id, checkpoint.commit)
            built.append((cls._load_head(checkpoint, where, precision), checkpoint.family, base))

        addresses = [bootstrap] if isinstance(bootstrap, str | Multiaddr) else list(bootstrap)
        opening: Any = open_swarm(model, revision, addresses, options, build)
        if daemon:
            opening = open_daemon(model, revision, socket_of(daemon, addresses, options), options, build)
        bridge = Bridge()
        try:
            blocks, close = bridge.hold(opening)
            head, family, base = built.pop()
            made: Any = head.model
            made._connect(head, family, Swarm(bridge, blocks), (close, bridge.close))
            adapters = Adapters(base, any_base=any_base)
            made.swarm.check_adapters = adapters.check
            for name, value in (("_base", base), ("_hub", hub), ("_any_base", any_base), ("_adapters", adapters)):
                object.__setattr__(made, name, value)
        except BaseException:
            bridge.close()
            raise
        # Autograd graphs hold the swarm, and may outlive the model.
        weakref.finalize(made.swarm, bridge.stop).atexit = False
        made.name_or_path = made.config._name_or_path = str(model)
        if tuning_mode is not None:
            facts = blocks.facts
            prompts = Prompts(facts.block_count, pre_seq_len, facts.width, deep=tuning_mode == "deep_ptune")
            made.prompts = made.swarm.prompts = prompts.to(where)
        if given is not None:
            made._take_or_close(given)
        result: Self = made
        return result

    def _take_or_close(self, given: TrainedFile) -> None:
        try:
            self._take(given)
        except BaseException:
            self.close()
            raise

    @classmethod
    def _load_head(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> HeadModel:
        raise TypeError(f"{cls.__name__} is a mixin: call from_pretrained of one of the RemoteModelFor... classes")

    def _connect(self, head: HeadModel, family: Family, swarm: Swarm, closes: tuple[Callable[[], None], ...]) -> None:
        """Give remote blocks to the model, which has a head and no layers."""
        me: Any = self
        layers = make_remote(head.layers, swarm)
        setattr(head.decoder, family.layers, layers)
        swarm.layers = list(layers)
        # Set directly: as submodules they would have two names, and nn.Module's __setattr__ would register them.
        object.__setattr__(self, "swarm", swarm)
        object.__setattr__(self, "_closes", closes)
        me.requires_grad_(False)
        for parameter in self._trained_from_the_start():
            parameter.requires_grad_(True)
        watch_calls(self, head.decoder, layers=family.layers, embeddings=family.embeddings)
        use_no_masks(me.config)
        find_return_type(head.decoder, layers, family)

    def _trained_from_the_start(self) -> Sequence[nn.Parameter]:
        return ()

    # What Transformers calls.

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Make the cache of `generate` a remote one, with sessions of the length that it will need."""
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
        parent: Any = super()
        parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        for name in CACHE_NAMES:
            cache = model_kwargs.get(name)
            if cache is None:
                continue
            mode = str(kwargs.get("generation_mode", args[0] if args else "")).lower()
            # Assisted generation takes wrong candidates back, and a caller with a cache of its own may go back in it.
            goes_back = getattr(cache, "_is_user_defined", False) or "assist" in mode or generation_config.is_assistant
            if not isinstance(cache, RemoteCache):
                rollback = ROLLBACK if goes_back else 0
                RemoteCache.adopt(cache, len(self.swarm.layers), max_length=longest, max_rollback=rollback)
            cache.max_length = max(cache.max_length, longest)

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Refuses what `generate_batch` begins with, which pages the KV of local blocks."""
        raise NotImplementedError(
            "continuous batching pages the keys and values of local blocks: give generate() a padded batch; servers"
            " compute the requests of all programs as one batch anyway"
        )

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
    """The model without a language-model head, such as `LlamaModel`: token ids in, hidden states out."""

    @classmethod
    def _load_head(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> HeadModel:
        kind = remote_type(cls, checkpoint.family.decoder_type())
        return load_head_model(
            checkpoint, device=device, dtype=dtype, causal_type=kind, fill_head=lambda model, decoder: None
        )


class RemoteModelForCausalLM(RemotePreTrainedModel):
    """A causal language model: `generate`, `forward` with `labels`, gradients, peft. See `from_pretrained`."""

    @classmethod
    def _load_head(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> HeadModel:
        kind = remote_type(cls, checkpoint.family.causal_type())
        head = load_head_model(checkpoint, device=device, dtype=dtype, causal_type=kind)
        generation: Any = checkpoint.generation_config
        head.model.generation_config = generation
        return head


class RemoteModelForSequenceClassification(RemotePreTrainedModel):
    """A classifier over the last real position. Its head `score`, `num_labels` wide, is new and trained here."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        problem_type: str | None = None,
        trained: str | Path | None = None,
        **options: Any,
    ) -> Self:
        """As for the other remote models; `num_labels` is the number of classes: those of `trained`, or 2.

        id2label, label2id, problem_type: as in Transformers' configurations; by default those of `trained`.
        """
        given = {"id2label": id2label, "label2id": label2id, "problem_type": problem_type}
        file = None if trained is None else read_trained(trained, options.get("hub"))
        count, classes = classes_of(num_labels, given, file)
        body = {"__module__": cls.__module__, "_num_labels": count, "_classes": classes}
        kind: Any = type(cls.__name__, (cls,), body)
        opened: Any = super(RemoteModelForSequenceClassification, kind).from_pretrained(
            model, trained=trained, **options
        )
        result: Self = opened
        return result

    _num_labels = 2
    _classes: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def _load_head(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> HeadModel:
        from transformers import AutoModelForSequenceClassification

        mapping: Any = AutoModelForSequenceClassification._model_mapping
        config = checkpoint.config
        if type(config) not in mapping:
            raise ValueError(f"Transformers has no sequence classification for {config.model_type}")
        config.num_labels = cls._num_labels
        for name, value in cls._classes.items():
            setattr(config, name, value)
        kind = remote_type(RemoteModelForSequenceClassification, mapping[type(config)])

        def make_score(model: Any, decoder: Any) -> None:
            width, labels = model.score.in_features, cls._num_labels
            bias = model.score.bias is not None
            model.score = nn.Linear(width, labels, bias=bias, device=device, dtype=dtype or checkpoint.dtype)
            nn.init.normal_(model.score.weight, std=getattr(config, "initializer_range", 0.02))

        return load_head_model(checkpoint, device=device, dtype=dtype, causal_type=kind, fill_head=make_score)

    def _trained_from_the_start(self) -> Sequence[nn.Parameter]:
        me: Any = self
        return list(me.score.parameters())
