"""Which of a tokenizer's special tokens end a turn, by what its chat template writes after a message.

A template is a program that came with the model, so it is parsed and never run here. A special token that it writes
right after a message's content ends a turn, whatever it is called; the names that publishers use are known besides, for
templates that put something between the two. Knows templates and tokens; knows no checkpoint.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# What published templates call the end of a turn: ChatML, Llama 3 and 4, Phi, Gemma 2 to 4, Cohere, DeepSeek, SmolVLM,
# Ling, MiniMax, HyperCLOVA; and of texts without a template.
KNOWN_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|assistant_end|>",
    "<|role_end|>",
    "<end_of_utterance>",
    "[e~[",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|end_of_text|>",
    "<|endoftext|>",
)
# In OpenAI's Harmony `<|end|>` is between two messages of one answer, and these are its ends.
HARMONY_ENDS = ("<|return|>", "<|call|>")
# A tag of Transformers' own, which marks what training counts.
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_CONTENT_NAMES = ("content", "text")


def turn_ends(template: object, special: Mapping[str, int]) -> list[int]:
    """The ids of special tokens (`special`: text -> id) with which this chat template ends a turn.

    `template` is one template, or several by name. None of them has to parse: then only known names count.
    """
    if HARMONY_ENDS[0] in special:
        return [special[end] for end in HARMONY_ENDS if end in special]
    found: list[int] = []
    for source in template.values() if isinstance(template, Mapping) else [template]:
        if isinstance(source, str):
            known = [end for end in KNOWN_ENDS if end in special and end in source]
            found += [special[end] for end in (*_after_content(source, special), *known)]
    return list(dict.fromkeys(found))


def _after_content(source: str, special: Iterable[str]) -> Iterator[str]:
    """The special tokens that follow a message's content at once."""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
    try:
        outputs = list(environment.parse(_GENERATION_TAG.sub("", source)).find_all(nodes.Output))
    except (TemplateSyntaxError, RecursionError):
        return
    # Of tokens that begin alike, the longest.
    longest_first = sorted(special, key=len, reverse=True)
    for output in outputs:
        parts = [part for node in output.nodes for part in _parts(node)]
        for before, text in itertools.pairwise(parts):
            if before is None and text is not None:
                yield from itertools.islice((end for end in longest_first if text.lstrip().startswith(end)), 1)


def _parts(node: Any) -> Iterator[str | None]:
    """What an expression writes, from left to right: literal text, None for a message's content, "" for all else."""
    from jinja2 import nodes

    if isinstance(node, nodes.TemplateData):
        yield node.data
    elif isinstance(node, nodes.Const):
        yield str(node.value)
    elif isinstance(node, nodes.Add):
        yield from _parts(node.left)
        yield from _parts(node.right)
    elif isinstance(node, nodes.Concat):
        for part in node.nodes:
            yield from _parts(part)
    elif isinstance(node, nodes.Filter) and node.node is not None:
        yield from _parts(node.node)
    elif isinstance(node, nodes.Call):
        # `message.content.strip()`.
        yield from _parts(node.node.node if isinstance(node.node, nodes.Getattr) else node.node)
    else:
        yield None if _is_content(node) else ""


def _is_content(node: Any) -> bool:
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return node.attr in _CONTENT_NAMES
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value in _CONTENT_NAMES
    return isinstance(node, nodes.Name) and node.name in _CONTENT_NAMES
