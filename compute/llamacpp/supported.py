"""Which models llama.cpp may compute in peerd's place: those whose blocks are the same wherever a span is cut.

llama.cpp takes some facts about a block from the block's number: which of them have windows, or no rotary embedding. A
span's blocks are numbered from 0, so such a model would be computed wrongly. It also scales some models' input where
the span begins. So there is a list, which tests hold to the families' own arithmetic, and each span is compared with
it once more when it is loaded (`self_test.py`).
"""

from __future__ import annotations

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.gguf.header import GgufTensor, Value
from peerd.compute.checkpoint.gguf.split import GgufFiles
from peerd.compute.checkpoint.gguf.weights import GgufWeights
from peerd.compute.families.layer_kinds import layer_kinds

_PLAIN = {"F32", "F16", "BF16"}
#: GGUF's names of architectures.
ARCHITECTURES = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
# The only rotary embeddings that llama.cpp surely turns as Transformers does at any length: plain ones, and Llama 3's
# factors, which the file states one by one.
_ROPES = ("default", "llama3")


def file_of(checkpoint: Checkpoint) -> GgufFiles:
    """The checkpoint's GGUF file. Raises ValueError if it is none."""
    weights = checkpoint.weights
    if not isinstance(weights, GgufWeights):
        raise ValueError(f"{checkpoint.name} is not a GGUF file")
    return weights.file


def why_not(checkpoint: Checkpoint) -> str:
    """Why llama.cpp cannot compute this model here; empty if it can."""
    if not isinstance(checkpoint.weights, GgufWeights):
        return "is not a GGUF file"
    metadata = file_of(checkpoint).metadata
    if (name := metadata["general.architecture"]) not in ARCHITECTURES:
        return f"is a {name}, of which blocks cannot be cut out for llama.cpp"
    if any(kind.window is not None or kind.chunk is not None or kind.latent for kind in layer_kinds(checkpoint.config)):
        return "has blocks that keep only a window"
    rope = getattr(checkpoint.config, "rope_parameters", None) or {}
    if (kind := rope.get("rope_type", "default")) not in _ROPES:
        return f"has rotary embeddings of the kind {kind}, which llama.cpp scales in another way"
    if (odd := _odd_vector(checkpoint)) is not None:
        return f"stores {odd.name} as {odd.kind.name}, which llama.cpp takes in F32 only"
    if uneven := [key for key, value in metadata.items() if _is_by_block(key, value, checkpoint.block_count)]:
        return f"has blocks that differ in {uneven[0]}"
    return ""


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether the file stores matrices in fewer bits than their publisher trained them in."""
    kinds = {tensor.kind.name for tensor in file_of(checkpoint).tensors.values() if len(tensor.shape) > 1}
    return not kinds <= _PLAIN


def _odd_vector(checkpoint: Checkpoint) -> GgufTensor | None:
    """A bias or a norm that is not in F32. llama.cpp would find out while it computes, and end the process."""
    tensors = file_of(checkpoint).tensors.values()
    return next((each for each in tensors if len(each.shape) == 1 and each.kind.name != "F32"), None)


def _is_by_block(key: str, value: Value, blocks: int) -> bool:
    """Whether a field of the architecture's has a value for each block."""
    return isinstance(value, tuple) and len(value) == blocks and not key.startswith(("tokenizer.", "general."))
