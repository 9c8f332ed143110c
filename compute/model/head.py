"""The head: the embeddings before the first block, and the final norm and LM head after the last.

It is the whole model without its blocks, so Transformers' own code applies the final norm and caps and scales
logits. If the embedding is the LM head as well, it is held once. Several threads may use it at once. Some families
add a row of a position table to each embedding, so a token must be embedded for the position that it will have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from peerd.compute.checkpoint.parameter_names import LM_HEAD, LM_HEAD_BIAS
from peerd.compute.families.family import Family
from peerd.compute.families.meta_build import build_on_meta, check_filled, compute_buffers, fill
from peerd.compute.model.input_side import take_off_input_side
from peerd.compute.model.lm_head import LmHead
from peerd.compute.model.stored_embedding import StoredEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from peerd.compute.checkpoint.checkpoint import Checkpoint

# Logits are computed for this many positions at a time: some families (Gemma's cap) make several copies of them, of 128
# MiB each for a vocabulary of 256k.
POSITIONS_AT_ONCE = 128


class Head:
    """Turns token ids into hidden states, and hidden states into logits. Frozen, in evaluation mode."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model: Any = model
        decoder = _decoder(model, family)
        self._embeddings: Any = getattr(decoder, family.embeddings)
        self._vocab_size = int(self._embeddings.num_embeddings)
        # `logits` runs the model on the last block's output, to which the input side must not be applied.
        self._input_side = take_off_input_side(decoder, family)
        self._decoder: Any = decoder
        self._lm_head = LmHead(getattr(model, family.lm_head))
        setattr(model, family.lm_head, self._lm_head)

    def make_shortlist(self) -> None:
        """Prepare to find the most likely tokens sooner, if this CPU gains by it. Blocks the thread."""
        self._lm_head.make_shortlist()

    @property
    def config(self) -> PreTrainedConfig:
        """The whole model's configuration."""
        config: PreTrainedConfig = self.model.config
        return config

    @property
    def vocab_size(self) -> int:
        """The number of token ids, and of logits for a position."""
        return self._vocab_size

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def max_positions(self) -> int | None:
        """How many positions can be embedded; None if an embedding does not depend on its position."""
        return self._input_side.max_positions

    @property
    def _weight(self) -> torch.Tensor:
        """A weight that is there, for the head's device and dtype: a head may lack the LM head, or the embeddings."""
        own: torch.Tensor = self._lm_head.weight
        return own if len(own) else self.embedding_weight

    @property
    def embedding_weight(self) -> torch.Tensor:
        """The embedding table, [vocabulary, embedding width]."""
        weight: torch.Tensor = self._embeddings.weight
        return weight

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The first block's input, [n, hidden size], for token ids, int64 [n].

        `positions`, int64 [n], are absolute and less than `max_positions`; the default counts from 0.
        """
        if positions is None:
            positions = torch.arange(token_ids.shape[-1])
        with torch.no_grad():
            return self._input_side(self._embeddings(token_ids.to(self._weight.device)), positions)

    def logits(self, hidden: torch.Tensor, most: int | None = None) -> torch.Tensor:
        """Logits, fp32 [n, vocabulary], on the head's device, for the last block's output [n, hidden size].

        With `most`, only the `most` largest of each position must be right: the others may be smaller than they are.
        """
        weight = self._weight
        result = torch.empty(len(hidden), self.vocab_size, device=weight.device)
        with torch.no_grad(), self._lm_head.only_best(most):
            for start in range(0, len(hidden), POSITIONS_AT_ONCE):
                part = hidden[start : start + POSITIONS_AT_ONCE].to(device=weight.device, dtype=weight.dtype)
                # As n sequences of one position: for one sequence of n, the model would build a mask of n x n.
                output = self.model(inputs_embeds=part[:, None], use_cache=False)
                result[start : start + POSITIONS_AT_ONCE] = output.logits[:, 0]
        return result

    def last_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the whole decoder gives out, fp32 [n, width], on the CPU, for the last block's output [n, hidden size].

        That is after the final norm: Transformers' `last_hidden_state`.
        """
        weight, parts = self._weight, []
        with torch.no_grad():
            for start in range(0, len(hidden), POSITIONS_AT_ONCE):
                part = hidden[start : start + POSITIONS_AT_ONCE].to(device=weight.device, dtype=weight.dtype)
                output = self._decoder(inputs_embeds=part[:, None], use_cache=False)
                parts.append(output.last_hidden_state[:, 0].float().cpu())
        return torch.cat(parts)

    def output_rows(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The LM head's weights, fp32 `[n, width]`, and biases, fp32 `[n]`, of token ids, int64 [n]."""
        weight, bias = self._lm_head.weight.detach(), self._lm_head.bias
        own = token_ids.to(weight.device)
        return weight[own].float(), None if bias is None else bias.detach()[own].float()

    def most_likely(self, last_hidden: torch.Tensor) -> torch.Tensor:
        """The most likely token ids, int64 [n], on the CPU, for what the decoder gives out [n, hidden size].

        A model's cap or scale of logits changes no order.
        """
        weight, parts = self.embedding_weight, []
        with torch.no_grad():
            for start in range(0, len(last_hidden), POSITIONS_AT_ONCE):
                part = last_hidden[start : start + POSITIONS_AT_ONCE].to(device=weight.device, dtype=weight.dtype)
                parts.append(self._lm_head(part).argmax(-1).cpu())
        return torch.cat(parts)

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The mean cross-entropy of predicting `targets`, int64 [n], from the last block's output [n, hidden size], and
        its gradient, fp32 [n, hidden size], on the CPU.
        """
        weight, total = self._weight, 0.0
        grads = []
        for start in range(0, len(hidden), POSITIONS_AT_ONCE):
            part = hidden[start : start + POSITIONS_AT_ONCE].to(weight.device, torch.float32).requires_grad_()
            own = targets[start : start + POSITIONS_AT_ONCE].to(weight.device)
            with torch.enable_grad():
                output = self.model(inputs_embeds=part[:, None].to(weight.dtype), use_cache=False)
                loss = nn.functional.cross_entropy(output.logits[:, 0].float(), own, reduction="sum") / len(hidden)
            grads.append(torch.autograd.grad(loss, part)[0].cpu())
            total += float(loss.detach())
        return total, torch.cat(grads)


Part = Literal["all", "input", "output"]
"""Which of a head's two large matrices is held: both, the embeddings alone, or the LM head alone."""


@dataclass(frozen=True, slots=True)
class HeadModel:
    """A causal model whose head has its weights and whose decoder has no layers."""

    model: PreTrainedModel
    decoder: PreTrainedModel
    #: The layers that were taken out of the decoder: names and shapes on the meta device.
    layers: nn.ModuleList


def load_head(checkpoint: Checkpoint, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Head:
    """Read the head onto `device`, in `dtype` (the checkpoint's own if None). Raises CheckpointError."""
    return Head(load_head_model(checkpoint, device=device, dtype=dtype).model, checkpoint.family)


def load_input_side(checkpoint: Checkpoint) -> HeadModel:
    """Read what embeds tokens and computes no logits. Where the checkpoint can read single rows of the embeddings, they
    stay in its file: then it must be open as long as they are used. Raises CheckpointError.
    """
    return load_head_model(checkpoint, part="input")


def load_output_side(checkpoint: Checkpoint, *, device: str | torch.device = "cpu") -> Head:
    """Read a head that computes logits and embeds nothing, onto `device`. Raises CheckpointError."""
    return Head(load_head_model(checkpoint, device=device, part="output").model, checkpoint.family)


def output_side_bytes(checkpoint: Checkpoint) -> int:
    """The bytes of the LM head, which are all but some kilobytes of what `load_output_side` takes."""
    return int(checkpoint.config.vocab_size) * checkpoint.hidden_size * checkpoint.dtype.itemsize


def load_head_model(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    causal_type: type[PreTrainedModel] | None = None,
    fill_head: Callable[[PreTrainedModel, PreTrainedModel], None] | None = None,
    part: Part = "all",
) -> HeadModel:
    """Build the family's causal model and read its head, or a part of it, without its blocks.

    causal_type: another class around the same decoder.
    fill_head: gives values to what `causal_type` has instead of the LM head; called with the model and its decoder.
    part: with `input`, embeddings stay in the checkpoint, which must be open as long as the head is used, if it can
        read single rows. The matrix that is left out has no rows.

    The head lies on `device`, in `dtype` (the checkpoint's own if None). Raises CheckpointError, UnsupportedModelError.
    """
    family, device = checkpoint.family, torch.device(device)
    model = build_on_meta(causal_type or family.causal_type(), checkpoint.config, dtype or checkpoint.dtype)
    decoder = _decoder(model, family)
    layers: nn.ModuleList = getattr(decoder, family.layers)
    setattr(decoder, family.layers, nn.ModuleList())
    lm_head: Any = getattr(model, family.lm_head, None)
    if part == "output":
        _fill_lm_head_alone(lm_head, decoder, family, checkpoint, device)
    elif part == "input":
        _leave_out(lm_head, device)
        _look_up_in_file(decoder, family, checkpoint)
    fill(decoder, _own_tensors(decoder, family, checkpoint), device, checkpoint.path)
    if fill_head is not None:
        fill_head(model, decoder)
    elif part == "all":
        _fill_lm_head(lm_head, getattr(decoder, family.embeddings), checkpoint, device)
    compute_buffers(model, model.config, device)
    check_filled(model, checkpoint.path)
    return HeadModel(model, decoder, layers)


def _decoder(model: PreTrainedModel, family: Family) -> PreTrainedModel:
    base: Any = model.base_model
    decoder: PreTrainedModel = getattr(base, family.decoder_at) if family.decoder_at else base
    return decoder


def _own_tensors(
    decoder: PreTrainedModel, family: Family, checkpoint: Checkpoint
) -> Iterator[tuple[str, torch.Tensor]]:
    """What the decoder has beside its blocks.

    Of an embedding that is tied to the LM head some files keep the head alone: it is the same tensor.
    """
    embedding = f"{family.embeddings}.weight"
    for name, tensor in decoder.state_dict().items():
        source = name
        if tensor.dim() and not len(tensor):
            continue
        if name == embedding and checkpoint.config.tie_word_embeddings and not checkpoint.has(name):
            source = LM_HEAD if checkpoint.has(LM_HEAD) else name
        yield from ((name, value) for _, value in checkpoint.read([source], tensor.dtype))


def _embedding_name(family: Family, checkpoint: Checkpoint) -> str:
    """The name under which the checkpoint stores the embeddings: see `_own_tensors`."""
    name = f"{family.embeddings}.weight"
    return LM_HEAD if not checkpoint.has(name) and checkpoint.config.tie_word_embeddings else name


def _look_up_in_file(decoder: PreTrainedModel, family: Family, checkpoint: Checkpoint) -> None:
    """Leave the embeddings in the checkpoint's file, if it can read single rows of them."""
    rows = checkpoint.rows(_embedding_name(family, checkpoint))
    if rows is not None:
        setattr(decoder, family.embeddings, StoredEmbedding(getattr(decoder, family.embeddings), rows))


def _leave_out(matrix: Any, device: torch.device) -> None:
    """Take all rows from the weight of an embedding or an LM head, and from its bias."""
    for leaf in ("weight", "bias"):
        if (value := getattr(matrix, leaf, None)) is not None:
            empty = torch.empty(0, *value.shape[1:], dtype=value.dtype, device=device)
            setattr(matrix, leaf, nn.Parameter(empty, requires_grad=False))


def _fill_lm_head_alone(
    linear: nn.Linear, decoder: PreTrainedModel, family: Family, checkpoint: Checkpoint, device: torch.device
) -> None:
    """Give the LM head its weights, from the embeddings' tensor if only that is stored, and leave those out."""
    source = LM_HEAD if checkpoint.has(LM_HEAD) else _embedding_name(family, checkpoint)
    names = {source: "weight"} | ({LM_HEAD_BIAS: "bias"} if linear.bias is not None else {})
    tensors = ((names[name], tensor) for name, tensor in checkpoint.read(names, linear.weight.dtype))
    fill(linear, tensors, device, checkpoint.path)
    _leave_out(getattr(decoder, family.embeddings), device)


def _fill_lm_head(linear: nn.Linear, embeddings: nn.Embedding, checkpoint: Checkpoint, device: torch.device) -> None:
    """Give the LM head its weights: its own if the checkpoint stores them, else, if it is tied, the embedding's.

    Some checkpoints declare the two tied and store both. As in Transformers, the stored weights then decide.
    """
    names = {LM_HEAD: "weight", LM_HEAD_BIAS: "bias"}
    wanted = [name for name, leaf in names.items() if getattr(linear, leaf) is not None]
    tied = bool(checkpoint.config.tie_word_embeddings)
    if tied and not checkpoint.has(LM_HEAD):
        linear.weight = embeddings.weight
        wanted.remove(LM_HEAD)
    tensors = ((names[name], tensor) for name, tensor in checkpoint.read(wanted, linear.weight.dtype))
    fill(linear, tensors, device, checkpoint.path)
    if tied and torch.equal(linear.weight, embeddings.weight):
        linear.weight = embeddings.weight
