r"""Cuts text into pieces as a GGUF file's byte-level vocabulary asks for, before the vocabulary's merges join bytes.

The file names the way and does not state it. Transformers knows some of the names, and cuts as GPT-2 does where it
knows none, which gives other tokens than the model was trained with. The patterns here are those in the tokenizers that
the models were published with: each is applied to what the patterns before it left. A name that is in no list here is
told to the user.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

log = logging.getLogger(__name__)

_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}{1,3}"


def _words(digits: str) -> str:
    """Llama 3's pattern, with so many digits in a piece."""
    return rf"{_ENDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _by_case(digits: str, ends: str, upper: str = _UPPER, lower: str = _LOWER, after: str = r"[\r\n/]*") -> str:
    """GPT-4o's pattern, in which a capital letter begins a piece."""
    first = rf"[^\r\n\p{{L}}\p{{N}}]?[{upper}]*[{lower}]+{ends}"
    second = rf"[^\r\n\p{{L}}\p{{N}}]?[{upper}]+[{lower}]*{ends}"
    return rf"{first}|{second}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{after}|{_SPACES}"


_KIMI = r"[\p{Han}]+|" + _by_case(
    _DIGITS, f"{_ENDS}?", rf"{_UPPER}&&[^\p{{Han}}]", rf"{_LOWER}&&[^\p{{Han}}]", after=r"[\r\n]*"
)
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_CHINESE, _EAST_ASIAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

_BY_PATTERNS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    (_words(_DIGITS),): (
        "chatglm-bpe",
        "dbrx",
        "falcon3",
        "glm4",
        "lfm2",
        "llama-bpe",
        "llama-v3",
        "llama3",
        "pixtral",
        "smaug-bpe",
    ),
    (_words(_DIGIT),): ("qwen2", "deepseek-r1-qwen", "stablelm2"),
    (_by_case(_DIGITS, f"{_ENDS}?"),): ("gpt-4o", "llama4", "minimax-m2"),
    (_by_case(_DIGIT, ""),): ("tekken",),
    (_KIMI,): ("kimi-k2",),
    (_GPT2,): ("gpt-2", "olmo", "exaone4"),
    (_DIGIT, _GPT2): ("command-r", "exaone", "refact", "smollm", "starcoder"),
    (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"): ("falcon",),
    (" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",): ("bloom",),
    (_DIGITS, _CHINESE, _DEEPSEEK_V3): ("deepseek-v3",),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, _DIGIT): ("deepseek-coder",),
}
#: GGUF's name of a way to cut -> the patterns.
SPLITS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: patterns for patterns, names in _BY_PATTERNS.items() for name in names}
)


def cut_as_stated(tokenizer: Any, metadata: Mapping[str, object], where: object) -> None:
    """Let a tokenizer of Transformers cut text as the metadata of its GGUF file say."""
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    from tokenizers import Regex, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre")
    patterns = SPLITS.get(name) if isinstance(name, str) else None
    if patterns is None:
        log.warning(
            "%s cuts text into pieces in a way (%r) that peerd does not know: tokens may be others than the model was"
            " trained with. Where that matters, use the directory that the model was published as",
            where,
            name,
        )
        return
    parts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, last])
