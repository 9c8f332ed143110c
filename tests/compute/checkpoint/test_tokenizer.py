"""Tokenizers are loaded from the checkpoint, with their chat templates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.compute.checkpoint.gguf.architectures import ARCHITECTURES
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.checkpoint.tokenizer import generation_config, load_tokenizer
from peerd.compute.errors import CheckpointError
from tests.compute.gguf_writer import write_gguf

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


SPELLED = list(bytes_to_unicode().values())
TEXT = "hello  world 123's  <think> é 日本 hello<|end|>"


def byte_level(pre: str) -> dict[str, Any]:
    """A vocabulary of bytes, some merges, and two added tokens; as GGUF states it."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "1 2", "12 3", "' s", "Ġ Ġ"]
    tokens = [*SPELLED, *(merge.replace(" ", "") for merge in merges), "<|end|>", "<think>"]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * (len(tokens) - 2) + [3, 4],
        "merges": merges,
        "eos_token_id": tokens.index("hello"),
    }


def sentencepiece() -> dict[str, Any]:
    pieces = [
        "▁",
        *"helowrd12",
        "he",
        "ll",
        "hell",
        "hello",
        "▁hello",
        "▁w",
        "wor",
        "ld",
        "world",
        "▁world",
        "▁▁",
        "12",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


#: What single architectures must state beside the common sizes.
SIZES: dict[str, dict[str, Any]] = {
    "deepseek2": {"attention.key_length": 16, "attention.value_length": 8, "rope.dimension_count": 8},
    "lfm2": {"attention.head_count_kv": [2]},
    "lfm2moe": {"attention.head_count_kv": [2]},
}


def write_vocabulary(folder: Path, architecture: str, stated: dict[str, Any], **more: Any) -> Path:
    sizes: dict[str, Any] = {
        "block_count": 1,
        "embedding_length": 32,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }
    sizes |= SIZES.get(architecture, {})
    metadata = {f"tokenizer.ggml.{key}": value for key, value in {**stated, **more}.items() if value is not None}
    path = folder / "tiny.gguf"
    rows = len(stated.get("tokens") or "four")
    write_gguf(
        path,
        architecture,
        {**sizes, "context_length": 16, "feed_forward_length": 16, **metadata},
        {"token_embd.weight": np.zeros((rows, 32))},
    )
    return path


VOCABULARIES = [
    ("cohere2", byte_level("command-r")),
    ("command-r", byte_level("command-r")),
    ("deepseek2", byte_level("deepseek-v3")),
    ("exaone4", byte_level("exaone4")),
    ("glm4", byte_level("glm4")),
    ("glm4moe", byte_level("glm4")),
    ("lfm2", byte_level("lfm2")),
    ("lfm2moe", byte_level("lfm2")),
    ("llama4", byte_level("llama4")),
    ("mistral3", byte_level("tekken")),
    ("olmo2", byte_level("dbrx")),
    ("bloom", byte_level("bloom")),
    ("falcon", byte_level("falcon")),
    ("gemma", sentencepiece()),
    ("gemma2", sentencepiece()),
    ("gemma3", sentencepiece()),
    ("gpt-oss", byte_level("gpt-4o")),
    ("gpt2", byte_level("gpt-2")),
    ("granite", byte_level("refact")),
    ("llama", byte_level("llama-bpe")),
    ("smollm3", byte_level("smaug-bpe")),
    ("llama", byte_level("smollm")),
    ("llama", sentencepiece()),
    ("minimax-m2", byte_level("minimax-m2")),
    ("nemotron", sentencepiece()),
    ("phi3", byte_level("gpt-4o")),
    ("phi3", sentencepiece()),
    ("qwen2", byte_level("qwen2")),
    ("qwen2moe", byte_level("qwen2")),
    ("qwen3", byte_level("qwen2")),
    ("qwen3moe", byte_level("qwen2")),
    ("stablelm", byte_level("stablelm2")),
    ("starcoder2", byte_level("starcoder")),
]


#: Transformers cuts these texts as GPT-2 does.
CUT_BY_US = {"bloom", "command-r", "deepseek-v3", "falcon", "glm4", "refact", "smollm", "stablelm2", "starcoder"}
RELATIVES = {"gemma": "gemma2"} | dict.fromkeys(
    (
        "cohere2",
        "command-r",
        "deepseek2",
        "exaone4",
        "glm4",
        "glm4moe",
        "granite",
        "lfm2",
        "lfm2moe",
        "llama4",
        "mistral3",
    ),
    "llama",
)
RELATIVES |= {"olmo2": "llama", "smollm3": "llama"}


@pytest.mark.parametrize(
    ("architecture", "stated"), VOCABULARIES, ids=[f"{name}-{stated['model']}" for name, stated in VOCABULARIES]
)
def test_a_gguf_files_tokenizer_is_what_transformers_makes_of_it(
    tmp_path: Path, architecture: str, stated: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    with open_checkpoint(write_vocabulary(tmp_path, architecture, stated)) as checkpoint:
        ours = load_tokenizer(checkpoint)
    # It knows these tokenizers, but not of all architectures which of its own classes they need: a relative's.
    write_vocabulary(tmp_path, RELATIVES.get(architecture, architecture), stated)
    theirs: Any = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="tiny.gguf")
    if stated.get("pre") not in CUT_BY_US:
        assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.decode(ours.encode(TEXT), skip_special_tokens=True) == theirs.decode(
        theirs.encode(TEXT), skip_special_tokens=True
    )
    assert (ours.eos_token, ours.bos_token) == (theirs.eos_token, theirs.bos_token)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("glm4", "I|'m|·|123|45|·ElonMusk|·日本|·don|'t|(x|)!?↵|·y"),
        ("stablelm2", "I|'m|·|1|2|3|4|5|·ElonMusk|·日本|·don|'t|(x|)!?↵|·y"),
        ("llama4", "I'm|·|123|45|·Elon|Musk|·日本|·don't|(x|)!?↵|·y"),
        ("tekken", "I|'m|·|1|2|3|4|5|·Elon|Musk|·日本|·don|'t|(x|)!?↵|·y"),
        ("kimi-k2", "I'm|·|123|45|·Elon|Musk|·|日本|·don't|(x|)!?↵|·y"),
        ("exaone4", "I|'m|·12345|·ElonMusk|·日本|·don|'t|(|x|)!?|↵|·y"),
        ("command-r", "I|'m|·|1|2|3|4|5|·ElonMusk|·日本|·don|'t|(|x|)!?|↵|·y"),
        ("falcon", "I|'|m|·|123|45|·ElonMusk|·日本|·don|'|t|(|x|)!?|↵|·y"),
        ("bloom", "I'm|·12345|·ElonMusk|·日本|·don't|(|x|)!?↵|·y"),
        ("deepseek-v3", "I|'m|·|123|45|·ElonMusk|·|日本|·don|'t|(x|)!?↵|·y"),
        ("deepseek-coder", "I|'|m|·|1|2|3|4|5|·ElonMusk|·|日本|·don|'|t|(|x|)!?|↵|·y"),
    ],
)
def test_text_is_cut_as_the_vocabulary_asks_for(tmp_path: Path, pre: str, pieces: str) -> None:
    """Blanks are shown as dots, the end of the line as an arrow."""
    with open_checkpoint(write_vocabulary(tmp_path, "llama", byte_level(pre))) as checkpoint:
        tokenizer: Any = load_tokenizer(checkpoint)
    text = pieces.replace("|", "").replace("·", " ").replace("↵", "\n")
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    whole = [text[start:end].replace(" ", "·").replace("\n", "↵") for _, (start, end) in cut]
    assert "|".join(whole) == pieces


def test_a_way_to_cut_text_that_is_not_known_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_checkpoint(write_vocabulary(tmp_path, "llama", byte_level("deepseek-llm"))) as checkpoint:
        load_tokenizer(checkpoint)
    assert "cuts text into pieces in a way ('deepseek-llm') that peerd does not know" in caplog.text


def test_every_architecture_of_gguf_has_a_vocabulary_here() -> None:
    assert {architecture for architecture, _ in VOCABULARIES} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tokens": None}, "field 'tokens' is missing"),
        ({"model": "rwkv"}, "stating tokenizer 'rwkv'"),
        ({"eos_token_id": 99999}, "list index out of range"),
        ({"merges": ["h e", "x"]}, "expected tuple of length 2"),
        ({"merges": ["h e", "zz zz"]}, "`zz` out of vocabulary"),
        ({"merges": None}, "field 'scores' is missing"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_a_clear_error(
    tmp_path: Path, more: dict[str, Any], reason: str
) -> None:
    path = write_vocabulary(tmp_path, "llama", byte_level("llama-bpe"), **more)
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=rf"(?s)tiny\.gguf: has no .*{reason}"),
    ):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        (["<|eot_id|>", "<|end_of_text|>", "<|other|>"], ["hello", "<|eot_id|>", "<|end_of_text|>"]),
        (["<end_of_turn>"], ["hello", "<end_of_turn>"]),
        (["<|im_end|>", "hello"], ["hello", "<|im_end|>"]),
        (["<|return|>", "<|call|>", "<|end|>"], ["hello", "<|return|>", "<|call|>"]),
        ([], ["hello"]),
    ],
)
def test_the_end_of_a_turn_ends_an_answer_though_gguf_names_only_the_end_of_a_text(
    tmp_path: Path, control: list[str], expected: list[str]
) -> None:
    stated = byte_level("llama-bpe")
    added = [token for token in control if token not in stated["tokens"]]
    stated["tokens"] = [token for token in stated["tokens"] if token not in added] + added
    types = {token: 3 for token in control}
    stated["token_type"] = [types.get(token, 1) for token in stated["tokens"]]
    stated["eos_token_id"] = stated["tokens"].index("hello")
    with open_checkpoint(write_vocabulary(tmp_path, "llama", stated)) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        config = generation_config(checkpoint, tokenizer)
    assert tokenizer.convert_ids_to_tokens(config.eos_token_id) == expected


def test_a_directory_says_itself_what_ends_an_answer(with_tokenizer: Path) -> None:
    with open_checkpoint(with_tokenizer) as checkpoint:
        config = generation_config(checkpoint, load_tokenizer(checkpoint))
        assert config.eos_token_id == [checkpoint.generation_config.eos_token_id] == [2]


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


def chatty(
    folder: Path, tiny: Path, end: str, template: str | None, *, eos: object = 3, more: str = "", special: bool = True
) -> Path:
    """A tiny llama whose tokenizer calls token 90 `end`, with this template."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<|end_of_text|>", 90: end, 91: more or "w91"}
    words = {names.get(number, f"w{number}"): number for number in range(92)}
    backend: Any = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.add_special_tokens([AddedToken(name, special=True) for number, name in names.items() if number < 90])
    added = [AddedToken(name, special=special) for number, name in names.items() if number >= 90]
    (backend.add_special_tokens if special else backend.add_tokens)(added)
    directory = Path(shutil.copytree(tiny, folder / "chatty"))
    (directory / "generation_config.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


def ends_of(directory: Path) -> list[int]:
    with open_checkpoint(directory) as checkpoint:
        found: list[int] = generation_config(checkpoint, load_tokenizer(checkpoint)).eos_token_id
    return found


TURNS = {
    "text": "{% for m in messages %}<|user|> {{ m.content }} END {% endfor %}w9",
    "a sum": "{% for m in messages %}{{ '<|user|>' + m['role'] + m['content'] | trim + 'END' + '\\n' }}{% endfor %}",
    "a method": "{% for m in messages %}{{ '<|user|>' + m.content.strip() ~ 'END' }}{% endfor %}",
    "a variable": "{% for m in messages %}{% set content = m.content %}{{ content + 'END' }}{% endfor %}",
    "for training": "{% for m in messages %}{% generation %}{{ m.content + 'END' }}{% endgeneration %}{% endfor %}",
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("end", ["<|im_end|>", "<|done|>", "<turn|>"])
def test_what_a_template_writes_after_a_message_ends_an_answer(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, end: str, turn: str
) -> None:
    """Also where configurations and tokenizer name the end of the text alone: the model was tuned, they were not."""
    directory = chatty(tmp_path, tiny_checkpoint("llama"), end, TURNS[turn].replace("END", end))
    assert ends_of(directory) == [3, 90, 2]


def test_an_end_that_does_not_follow_the_content_is_known_by_its_name(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.content }}{% if m.calls %}{{ m.calls }}{% endif %}{{ 'END' }}{% endfor %}"
    known = chatty(tmp_path / "a", tiny_checkpoint("llama"), "<|im_end|>", template.replace("END", "<|im_end|>"))
    other = chatty(tmp_path / "b", tiny_checkpoint("llama"), "<|done|>", template.replace("END", "<|done|>"))
    assert (ends_of(known), ends_of(other)) == ([3, 90, 2], [3, 2])


def test_tokens_that_are_text_or_in_no_template_end_nothing(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    template = TURNS["text"].replace("END", "<|im_end|>")
    text = chatty(tmp_path / "a", tiny_checkpoint("llama"), "<|im_end|>", template, special=False)
    base = chatty(tmp_path / "b", tiny_checkpoint("llama"), "<|im_end|>", None)
    broken = chatty(tmp_path / "c", tiny_checkpoint("llama"), "<|done|>", "{% for %}<|done|>")
    assert ends_of(text) == ends_of(base) == ends_of(broken) == [3, 2]


def test_an_end_that_no_configuration_names_is_the_tokenizers(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    assert ends_of(chatty(tmp_path, tiny_checkpoint("llama"), "<|x|>", None, eos=None)) == [2]


def test_what_comes_between_two_messages_of_harmony_ends_no_answer(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    template = TURNS["text"].replace("END", "<|end|>")
    directory = chatty(tmp_path, tiny_checkpoint("llama"), "<|end|>", template, more="<|return|>")
    assert ends_of(directory) == [3, 91, 2]
