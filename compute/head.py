"""The head is what is not a block: embeddings before the first, final norm and LM head after the last.

It is the whole model with all its blocks taken out, so that Transformers' own code scales embeddings, caps
and scales logits. Holds the embedding once, also where it is the LM head as well. Safe to use from several
threads at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peerd.compute.cut_model import build_on_meta, check_filled, compute_buffers, fill
from peerd.compute.families import Family
from peerd.compute.parameter_names import LM_HEAD

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from peerd.compute.checkpoint import Checkpoint


class Head:
    """Token ids to hidden states, and hidden states to logits. Frozen, in evaluation mode."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        decoder: Any = model.base_model
        self.model: Any = model
        self._embeddings: Any = getattr(decoder, family.embeddings)
        self._scale = 1.0
        self._norm: Any = nn.Identity()
        # A span's decoder leaves out what the whole one does to its input; here the input may also be the last
        # block's output, so it is done in `embed` and left out of the model too.
        if family.embedding_scale:
            self._scale = float(getattr(decoder, family.embedding_scale))
            setattr(decoder, family.embedding_scale, 1.0)
        if family.embedding_norm:
            self._norm = getattr(decoder, family.embedding_norm)
            setattr(decoder, family.embedding_norm, nn.Identity())

    @property
    def config(self) -> PreTrainedConfig:
        """The whole model's configuration."""
        config: PreTrainedConfig = self.model.config
        return config

    @property
    def vocab_size(self) -> int:
        """How many logits there are for a position."""
        return int(self.embedding_weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states."""
        return int(self.embedding_weight.shape[1])

    @property
    def embedding_weight(self) -> torch.Tensor:
        """The embedding table, [vocabulary, hidden size]."""
        weight: torch.Tensor = self._embeddings.weight
        return weight

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Ids, int64 [n], to the first block's input, [n, hidden size], scaled and normed as the family does."""
        with torch.no_grad():
            embedded = self._embeddings(token_ids.to(self.embedding_weight.device))
            # A product with 1 is exact.
            result: torch.Tensor = self._norm(embedded * self._scale)
            return result

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last block's output, [n, hidden size], to logits, fp32 [n, vocabulary]."""
        weight = self.embedding_weight
        with torch.no_grad():
            # As n sequences of one position: for one sequence of n, the model would build a mask of n x n.
            inputs = hidden.to(device=weight.device, dtype=weight.dtype)[:, None]
            result: torch.Tensor = self.model(inputs_embeds=inputs, use_cache=False).logits[:, 0]
            return result.float()


def load_head(checkpoint: Checkpoint, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Head:
    """Read the head onto `device`, in `dtype` (the checkpoint's own if None). Raises CheckpointError."""
    family, device = checkpoint.family, torch.device(device)
    model = build_on_meta(family.causal_type(), checkpoint.config, dtype or checkpoint.dtype)
    setattr(model.base_model, family.layers, nn.ModuleList())
    prefix = f"{model.base_model_prefix}."
    tied = bool(checkpoint.config.tie_word_embeddings)
    wanted = [name.removeprefix(prefix) for name in model.state_dict() if not (tied and name == LM_HEAD)]
    tensors = checkpoint.read(wanted)
    named = ((name if name == LM_HEAD else prefix + name, tensor) for name, tensor in tensors)
    fill(model, named, device, checkpoint.path)
    if tied:
        model.tie_weights()
    compute_buffers(model, model.config, device)
    check_filled(model, checkpoint.path)
    return Head(model, family)
