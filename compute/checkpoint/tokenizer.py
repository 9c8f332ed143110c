"""A checkpoint's tokenizer, which carries its chat template, and the tokens that end an answer.

Transformers' own, never code that came with the model. From a GGUF file the generic class is asked
directly: `AutoTokenizer` would parse the whole file again to find out which class to use, and splits text the
same. The difficulty is what a GGUF file leaves out: it names one token that ends a text, where a chat model
has another for the end of its turn.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from peerd.compute.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from peerd.compute.checkpoint.checkpoint import Checkpoint

# The ends of a turn in published chat templates: Llama's, ChatML's, Phi's, Gemma's, and of texts without a template.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>")
# In OpenAI's Harmony `<|end|>` is between two messages of one answer, and these are its ends.
_HARMONY_ENDS = ("<|return|>", "<|call|>")


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
    except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: has no tokenizer that can be loaded: {reason}") from error
    except Exception as error:
        # What the tokenizers package raises of a vocabulary that contradicts itself has no type of its own.
        if type(error) is not Exception:
            raise
        raise CheckpointError(f"{path}: has no tokenizer that can be loaded: {error}") from error
    return tokenizer


def generation_config(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """How the publisher means the model to be sampled, with every token that ends an answer.

    A directory says so itself; to what a GGUF file names, the ends of turns that its tokenizer knows are added.
    """
    config = copy.deepcopy(checkpoint.generation_config)
    if not checkpoint.is_gguf:
        return config
    known = tokenizer.get_added_vocab()
    ends = _HARMONY_ENDS if _HARMONY_ENDS[0] in known else _ENDS
    stated = config.eos_token_id
    ids = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
    # Transformers adds tokens of its own, which the model has no embedding for.
    added = [known[end] for end in ends if known.get(end, checkpoint.config.vocab_size) < checkpoint.config.vocab_size]
    config.eos_token_id = ids + [token for token in added if token not in ids]
    return config
