"""A grammar as its user gives it: a JSON schema, a regular expression, or rules. Nothing is compiled here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

# An answer's grammar is walked through again for each token; the largest schemas of real programs have a fifth of it.
MAX_CHARACTERS = 128 * 1024
# A model that has nothing to say may write spaces for ever where JSON allows any number. Nobody indents further.
_JSON_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"

Kind = Literal["json_schema", "regex", "lark", "ebnf"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer may be. Made by the class methods; raises ValueError if it is too long.

    `around`: rules of Lark's for an answer in which the text that `source` describes is only a part, `@answer`.
    `strict`: a schema with a keyword that cannot be enforced is refused; otherwise such keywords are ignored.
    """

    kind: Kind
    source: str
    strict: bool = True
    around: str = ""

    def __post_init__(self) -> None:
        if len(self.source) > MAX_CHARACTERS:
            raise ValueError(f"has {len(self.source)} characters: at most {MAX_CHARACTERS} are taken")

    def __repr__(self) -> str:
        shown = self.source if len(self.source) <= 60 else f"{self.source[:60]}..."
        return f"<Grammar {self.kind} {shown!r}>"

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | bool, *, strict: bool = True) -> Grammar:
        """JSON that fits `schema`. Properties come in the schema's order."""
        return cls("json_schema", json.dumps(schema, ensure_ascii=False), strict)

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that the regular expression matches from its beginning to its end. It has no look-around."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of these texts."""
        return cls("lark", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))

    @classmethod
    def lark(cls, rules: str) -> Grammar:
        """Rules in the syntax of Lark, the first one called `start`. It may contain `%json {...}` with a schema."""
        return cls("lark", rules)

    @classmethod
    def ebnf(cls, rules: str) -> Grammar:
        """Rules in the syntax of llama.cpp (GBNF), the first one called `root`; or in Lark's."""
        return cls("ebnf", rules)

    def definition(self) -> str:
        """The grammar as llguidance reads it. Raises ValueError for rules that cannot be translated."""
        parts: list[dict[str, Any]] = [self._part()]
        if self.around:
            parts[0]["name"] = "answer"
            parts.insert(0, {"lark_grammar": self.around})
        return json.dumps({"grammars": parts})

    def _part(self) -> dict[str, Any]:
        if self.kind == "json_schema":
            return {"json_schema": with_options(json.loads(self.source), strict=self.strict)}
        if self.kind == "regex":
            # Lark's regular expressions stand between slashes.
            written = json.loads(_grammar_from("regex", self.source))
            return {"lark_grammar": written["grammars"][0]["lark_grammar"]}
        if self.kind == "ebnf":
            return {"lark_grammar": _grammar_from("ebnf", self.source)}
        return {"lark_grammar": self.source}


def with_options(schema: Any, *, strict: bool) -> Any:
    """A schema with llguidance's options for reading it, whatever options it brought."""
    if not isinstance(schema, dict):
        return schema
    options = {
        "lenient": not strict,
        "coerce_one_of": not strict,
        "whitespace_flexible": True,
        "whitespace_pattern": _JSON_SPACE,
        "item_separator": ",",
        "key_separator": ":",
    }
    return schema | {"x-guidance": options}


def _grammar_from(form: Literal["regex", "ebnf"], text: str) -> str:
    from llguidance import grammar_from

    return grammar_from(form, text)
