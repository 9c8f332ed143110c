"""Tokenizers come from where the checkpoint is, with their chat template."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peerd.compute.checkpoint import open_checkpoint
from peerd.compute.demo_model import demo_model_path
from peerd.compute.errors import CheckpointError
from peerd.compute.tokenizer import load_tokenizer

TinyCheckpoint = Callable[[str], Path]

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


@pytest.fixture
def with_tokenizer(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """The tiny llama with a tokenizer of words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    backend: Any = Tokenizer(WordLevel({"<unk>": 0, "hello": 1, "swarm": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    directory = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "words"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_directorys_tokenizer_is_read(with_tokenizer: Path) -> None:
    with open_checkpoint(with_tokenizer) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.encode("hello swarm stranger", add_special_tokens=False) == [1, 2, 0]
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>hello"


def test_a_checkpoint_without_a_tokenizer_says_so(tiny_checkpoint: TinyCheckpoint) -> None:
    with (
        open_checkpoint(tiny_checkpoint("llama")) as checkpoint,
        pytest.raises(CheckpointError, match="has no tokenizer"),
    ):
        load_tokenizer(checkpoint)


@pytest.mark.model
def test_the_real_tokenizer_knows_its_special_tokens_and_template() -> None:
    with open_checkpoint(demo_model_path()) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        assert checkpoint.generation_config.eos_token_id == 2
    text = "Hello  swarm\n  def f(x): 123 é 日本"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert isinstance(rendered, str)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
