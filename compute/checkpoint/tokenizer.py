"""A checkpoint's tokenizer, which carries its chat template, and the tokens that end an answer.

Transformers' own, never code that came with the model. From a GGUF file the generic class is asked
directly: `AutoTokenizer` would parse the whole file again to find out which class to use, and splits text the
same. The difficulty is what a GGUF file leaves out: it names one token that ends a text, where a chat model
has another for the end of its turn.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from peerd.compute.checkpoint.turn_ends import KNOWN_ENDS, turn_ends
from peerd.compute.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from peerd.compute.checkpoint.checkpoint import Checkpoint


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

    To those that the configurations name, what the tokenizer calls the end is added, and what the chat template ends a
    turn with: a model that was tuned for chat often still has the configuration of the one it was made from.
    """
    config = copy.deepcopy(checkpoint.generation_config)
    stated = config.eos_token_id
    if stated is None:
        stated = checkpoint.config.eos_token_id
    ids = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
    if checkpoint.is_gguf:
        # It names one end only, and may come without its template.
        ids += turn_ends(" ".join(KNOWN_ENDS), tokenizer.get_added_vocab())
    else:
        added = tokenizer.added_tokens_decoder.items()
        special = {str(token): number for number, token in added if token.special}
        ids += turn_ends(getattr(tokenizer, "chat_template", None), special)
    if tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    # Transformers adds tokens of its own, which the model has no embedding for.
    size = checkpoint.config.vocab_size
    config.eos_token_id = list(dict.fromkeys(token for token in ids if 0 <= token < size)) or None
    return config
