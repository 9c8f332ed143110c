"""Finds a tokenizer's special tokens that end a turn, from what its chat template writes after a message.

A template is a program that came with the model, so it is parsed here and never run. A special token that it writes
right after a message's content ends a turn, whatever its name. Some templates write something between the content and
the end; for these there is a list of the names that publishers use.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# The names that published templates use for the end of a turn (ChatML, Llama 3 and 4, Phi, Gemma 2 to 4, Cohere,
# DeepSeek, SmolVLM, Ling, MiniMax, HyperCLOVA), and those that end a text without a template.
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
# In OpenAI's Harmony format `<|end|>` separates two messages of one answer; these two end the answer.
HARMONY_ENDS = ("<|return|>", "<|call|>")
# A tag that only Transformers knows: it marks the text on which a model is trained.
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_CONTENT_NAMES = ("content", "text")


def turn_ends(template: object, special: Mapping[str, int]) -> list[int]:
    """The ids of special tokens (`special`: text -> id) with which this chat template ends a turn.

    `template` is one template, or several by name. If a template does not parse, only the known names in it count.
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
    """The special tokens that directly follow a message's content."""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
    try:
        outputs = list(environment.parse(_GENERATION_TAG.sub("", source)).find_all(nodes.Output))
    except (TemplateSyntaxError, RecursionError):
        return
    # If several tokens match, the longest is meant.
    longest_first = sorted(special, key=len, reverse=True)
    for output in outputs:
        parts = [part for node in output.nodes for part in _parts(node)]
        for before, text in itertools.pairwise(parts):
            if before is None and text is not None:
                yield from itertools.islice((end for end in longest_first if text.lstrip().startswith(end)), 1)


def _parts(node: Any) -> Iterator[str | None]:
    """The parts that an expression writes, left to right: literal text, None for a message's content, "" for anything
    else.
    """
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
        # For example `message.content.strip()`.
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
