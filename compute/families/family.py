"""The columns of the table of families: what must be known about one architecture to cut it into spans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peerd.compute.errors import UnsupportedModelError
from peerd.compute.transformers_compat import import_quietly, older_than

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Fused:
    """A parameter that checkpoints store in pieces.

    `parameter` is its name inside a block. `parts` are the stored names, in the order in which their rows are
    concatenated. If they have `{expert}`, for the expert's number, there is one set of them for each expert, and the
    parameter's shape is [experts, rows of all parts, columns]; otherwise it is [rows of all parts, ...].
    """

    parameter: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Where one architecture keeps its parts. Attribute names are those of its decoder."""

    model_type: str
    prefix: str
    layers: str = "layers"
    norm: str = "norm"
    embeddings: str = "embed_tokens"
    #: Stored name inside a block -> the parameter's name there, for names that Transformers has changed since.
    renamed: tuple[tuple[str, str], ...] = ()
    fused: tuple[Fused, ...] = ()
    #: Where publishers put the decoder's tensors, in addition to the usual places.
    stored_under: tuple[str, ...] = ()
    #: A norm that the decoder's forward applies to its input embeddings. It may be `norm` itself, applied at both ends.
    embedding_norm: str | None = None
    #: An attribute by which the decoder's forward multiplies its input embeddings.
    embedding_scale: str | None = None
    #: A field of the configuration: if true, the decoder's forward multiplies its input embeddings by the root of their
    #: width.
    root_scale_switch: str | None = None
    #: A table of absolute positions that the decoder's forward adds to its input embeddings. The head adds its row
    #: `position + position_offset`; a span adds nothing.
    positions: str | None = None
    position_offset: int = 0
    #: Linear maps between the embeddings' width and the blocks', which the head applies; the configuration may leave
    #: them None.
    project_in: str | None = None
    project_out: str | None = None
    #: The base model's attribute (`causal.base_model`) that holds the decoder; empty if the base model is the decoder.
    decoder_at: str = ""
    #: The causal model's attribute that holds its LM head.
    lm_head: str = "lm_head"
    #: Whether all blocks have a sliding window if the configuration sets `sliding_window` and lists no types of blocks.
    uniform_window: bool = False
    #: Whether the cache holds compressed latents, which the attention module expands into keys and values (MLA).
    latent: bool = False
    #: Whether attention goes through Transformers' `AttentionInterface`, so that a batch is one ragged forward. If not,
    #: the rows of a batch run one after the other.
    attention_interface: bool = True
    #: Whether `own_attention.py` makes this family's attention go through that interface.
    own_attention: bool = False
    # Class names, needed only if they do not follow from `model_type` and `prefix`.
    module: str = ""
    config_class: str = ""
    decoder_class: str = ""
    causal_class: str = ""
    #: Transformers' folder of the configuration, if it is not the model's.
    config_module: str = ""
    #: Whether Transformers has this decoder only inside a model that also sees: peerd gives it an LM head.
    sees: bool = False
    #: The name that checkpoints give the list of blocks, if it is not the decoder's.
    stored_layers: str = ""
    #: The first release of Transformers that computes the model as it was published, where earlier ones have the
    #: architecture and compute something else.
    since: str = ""

    def config_type(self) -> type[PreTrainedConfig]:
        """Import the configuration class. Raises UnsupportedModelError if the installed Transformers is too old for
        it.
        """
        name = self.config_class or f"{self.prefix}Config"
        config: type[PreTrainedConfig] = self._load("configuration", name, self.config_module)
        return config

    def decoder_type(self) -> type[PreTrainedModel]:
        """Import the class of the base model: embeddings, blocks and final norm. Raises UnsupportedModelError."""
        decoder: type[PreTrainedModel] = self._load("modeling", self.decoder_class or f"{self.prefix}Model")
        return decoder

    def causal_type(self) -> type[PreTrainedModel]:
        """The class of the whole language model, without what sees or hears. Raises UnsupportedModelError."""
        if self.sees:
            from peerd.compute.families.text_head import with_lm_head

            # A cached function takes what is hashable, and the class says no more than `Any` of that.
            decoder: Any = self.decoder_type()
            return with_lm_head(decoder)
        causal: type[PreTrainedModel] = self._load("modeling", self.causal_class or f"{self.prefix}ForCausalLM")
        return causal

    def _load(self, kind: str, name: str, folder: str = "") -> Any:
        if self.since and older_than(self.since):
            raise UnsupportedModelError(f"{self.model_type} needs Transformers {self.since} or newer")
        folder = folder or self.module or self.model_type.replace("-", "_")
        module = f"transformers.models.{folder}.{kind}_{folder}"
        try:
            return getattr(import_quietly(module), name)
        except (ModuleNotFoundError, AttributeError) as error:
            if isinstance(error, ModuleNotFoundError) and not module.startswith(str(error.name)):
                raise
            raise UnsupportedModelError(
                f"{self.model_type} needs a newer Transformers: it has no {module}.{name}"
            ) from None
