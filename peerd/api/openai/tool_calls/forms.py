"""The forms in which models write tool calls. A chat template shows its model's form, in which it writes past calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from peerd.api.openai.tool_calls.call import Parse, Reader, Schemas
from peerd.api.openai.tool_calls.harmony import HARMONY_MARKS, HarmonyReader
from peerd.api.openai.tool_calls.marked import MarkedReader
from peerd.api.openai.tool_calls.parsing import (
    parse_deepseek,
    parse_glm,
    parse_hermes,
    parse_llama,
    parse_mistral,
    parse_xml,
)

_DEEPSEEK = ("calls\u2581begin", "calls\u2581end", "call\u2581begin", "call\u2581end", "sep")
_DEEPSEEK_MARKS = tuple(f"<\uff5ctool\u2581{name}\uff5c>" for name in _DEEPSEEK)


@dataclass(frozen=True, slots=True)
class Form:
    """A form of calls. `signs`: what only templates of this form contain, all of it. `marks`: tokens that must be shown
    in the text though they may be special ones. `reads_text`: its templates take arguments as JSON text, and an answer
    without text as null. `short_ids`: its templates take ids of nine letters and digits only. `write`: writes a call
    (JSON of its name and arguments) as the model does, for templates that show tools but no past calls.
    """

    name: str
    signs: tuple[str, ...]
    marks: tuple[str, ...]
    reader: Callable[[Schemas], Reader]
    reads_text: bool = False
    short_ids: bool = False
    write: Callable[[str], str] | None = None


def _marked(start: str, end: str, parse: Parse, bare: bool = False) -> Callable[[Schemas], Reader]:
    return partial(MarkedReader, start, end, parse, bare=bare)


def _harmony(schemas: Schemas) -> Reader:
    return HarmonyReader()


_TAGS = ("<tool_call>", "</tool_call>")
_GLM_TAGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_DEEPSEEK_READER = _marked(_DEEPSEEK_MARKS[0], _DEEPSEEK_MARKS[1], parse_deepseek)
_LLAMA_READER = _marked("<|python_tag|>", "", parse_llama, bare=True)

# The first one whose signs are in a template is the template's: the signs of later ones may be there as well.
FORMS = (
    Form("harmony", ("<|channel|>", "functions."), HARMONY_MARKS, _harmony),
    Form("deepseek", _DEEPSEEK_MARKS[:1], _DEEPSEEK_MARKS, _DEEPSEEK_READER, reads_text=True),
    Form(
        "mistral",
        ("[TOOL_CALLS]",),
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        _marked("[TOOL_CALLS]", "", parse_mistral),
        short_ids=True,
    ),
    Form("glm", ("<tool_call>", "<arg_key>"), _TAGS + _GLM_TAGS, _marked(*_TAGS, parse_glm)),
    Form("xml", ("<tool_call>", "<function="), _TAGS, _marked(*_TAGS, parse_xml)),
    # Also SmolLM3 and many others.
    Form(
        "hermes", ("<tool_call>",), _TAGS, _marked(*_TAGS, parse_hermes), write="<tool_call>\n{}\n</tool_call>".format
    ),
    Form("llama", ("<|python_tag|>",), ("<|python_tag|>",), _LLAMA_READER),
    Form("llama", ('"name": function name, "parameters"',), ("<|python_tag|>",), _LLAMA_READER),
)


def form_of(template: str) -> Form | None:
    """The form in which a chat template writes calls. None if it is not known here."""
    return next((form for form in FORMS if all(sign in template for sign in form.signs)), None)
