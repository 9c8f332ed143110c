"""A checkpoint's tokenizer, which carries its chat template.

Transformers' own, never code that came with the model. From a GGUF file the generic class is asked
directly: `AutoTokenizer` would parse the whole file again to find out which class to use, and uses the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peerd.compute.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peerd.compute.checkpoint import Checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer, with `chat_template` if the model is made for chat. Raises CheckpointError if there is none."""
    path = checkpoint.path
    try:
        if checkpoint.is_gguf:
            from transformers import PreTrainedTokenizerFast

            load: Any = PreTrainedTokenizerFast.from_pretrained
            tokenizer: PreTrainedTokenizerBase = load(str(path.parent), gguf_file=path.name, local_files_only=True)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{path}: has no tokenizer that can be loaded: {error}") from error
    return tokenizer
