"""Loads a checkpoint's tokenizer, with its chat template, and finds the tokens that end an answer.

The tokenizer is Transformers' own, never code that came with the model. For a GGUF file the generic class is called
directly: `AutoTokenizer` would parse the whole file once more to find out which class to use, and splits text in the
same way. A GGUF file names only one token that ends a text, but a chat model has another for the end of its turn, which
must be found here.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerd.compute.checkpoint.gguf.splits import cut_as_stated
from peerd.compute.checkpoint.gguf.weights import GgufWeights
from peerd.compute.checkpoint.turn_ends import KNOWN_ENDS, turn_ends
from peerd.compute.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from peerd.compute.checkpoint.checkpoint import Checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer, with `chat_template` if the model is made for chat. Raises CheckpointError if there is none."""
    path = checkpoint.path
    try:
        tokenizer: PreTrainedTokenizerBase
        if checkpoint.is_gguf:
            with _gguf_path(checkpoint) as file:
                from transformers import PreTrainedTokenizerFast

                load: Any = PreTrainedTokenizerFast.from_pretrained
                tokenizer = load(str(file.parent), gguf_file=file.name, local_files_only=True)
            weights = checkpoint.weights
            assert isinstance(weights, GgufWeights)
            cut_as_stated(tokenizer, weights.file.metadata, path)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: has no tokenizer that can be loaded: {reason}") from error
    except Exception as error:
        # For a vocabulary that contradicts itself, the tokenizers package raises a plain Exception.
        if type(error) is not Exception:
            raise
        raise CheckpointError(f"{path}: has no tokenizer that can be loaded: {error}") from error
    return tokenizer


@contextmanager
def _gguf_path(checkpoint: Checkpoint) -> Iterator[Path]:
    """A GGUF file with the checkpoint's metadata, until the block ends."""
    metadata = checkpoint.gguf_metadata()
    if metadata is None:
        yield checkpoint.path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metadata.gguf")
        path.write_bytes(metadata)
        yield path


def generation_config(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The publisher's settings for sampling, with every token that ends an answer.

    The configurations name some of these tokens. The tokenizer's own end token is added, and the tokens with which the
    chat template ends a turn: a model that was tuned for chat often still has the configuration of the model it was
    made from.
    """
    config = copy.deepcopy(checkpoint.generation_config)
    stated = config.eos_token_id
    if stated is None:
        stated = checkpoint.config.eos_token_id
    ids = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
    if checkpoint.is_gguf:
        # A GGUF file names one end only, and may come without its template.
        ids += turn_ends(" ".join(KNOWN_ENDS), tokenizer.get_added_vocab())
    else:
        added = tokenizer.added_tokens_decoder.items()
        special = {str(token): number for number, token in added if token.special}
        ids += turn_ends(getattr(tokenizer, "chat_template", None), special)
    if tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    # Transformers adds tokens of its own, for which the model has no embedding.
    size = checkpoint.config.vocab_size
    config.eos_token_id = list(dict.fromkeys(token for token in ids if 0 <= token < size)) or None
    return config
