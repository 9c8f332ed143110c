"""Reads the requests of OpenAI's two endpoints: their fields, limits and defaults.

A field of OpenAI's that we do not support is refused if it would change the answer, and ignored otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peerd.api.fields import Fields
from peerd.api.openai.grammar_fields import AskedGrammar, read_grammar
from peerd.api.openai.messages import read_messages
from peerd.api.openai.sampling_fields import MAX_TOKENS, read_sampling
from peerd.api.openai.tool_fields import ToolFields, read_tools, refuse_functions
from peerd.protocol.messages.session import MAX_ROWS

# OpenAI's own limits.
MAX_CHOICES = 128
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
COMPLETION_TOKENS = 16
# OpenAI lets a chat answer fill the context; for that we would have to reserve KV on every peer.
CHAT_TOKENS = 2048

# Fields that change no token of an answer. `prediction` only makes OpenAI's servers faster.
_WITHOUT_EFFECT = (
    "cache_prompt",
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "priority",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
# Fields of OpenAI's and of vLLM's that we do not have, each with the value that asks for what happens anyway.
_UNSUPPORTED = {
    "include_stop_str_in_output": False,
    "length_penalty": 1,
    "moderation": None,
    "return_tokens_as_token_ids": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "use_beam_search": False,
}
_UNSUPPORTED_IN_CHATS = {
    "add_special_tokens": False,
    "audio": None,
    "modalities": ["text"],
    "verbosity": "medium",
    "web_search_options": None,
}
_UNSUPPORTED_IN_COMPLETIONS = {"add_special_tokens": True, "suffix": ""}
# What the renderer of templates is told by other fields.
_RENDERER_S = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "conversations", "messages", "tools"}
)
MAX_STOP_TOKENS = 128


@dataclass(frozen=True, slots=True)
class CommonFields:
    """The fields that both endpoints have. None stands for the model's own value. `rows`: answers to each prompt."""

    model: str
    max_tokens: int | None
    rows: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    include_chain: bool
    continuous_usage: bool
    top_logprobs: int | None
    sampling: dict[str, Any]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    grammar: AskedGrammar | None


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """How the chat template is rendered. `variables`: what the template may read. `effort`: of reasoning, if asked."""

    variables: dict[str, Any]
    effort: str | None = None
    opens_answer: bool = True
    continues_last: bool = False


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation that the model is to continue. `tools`: what it may call; None if it may call nothing."""

    common: CommonFields
    messages: list[dict[str, Any]]
    template: TemplateOptions
    tools: ToolFields | None


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Prompts to be continued, each a text or token ids. `echo`: each answer begins with its prompt.

    With `max_tokens` 0 nothing is continued.
    """

    common: CommonFields
    prompts: list[str | list[int]]
    echo: bool


def read_chat(fields: Fields) -> ChatRequest:
    """Read a body of /v1/chat/completions. Raises ApiError."""
    messages = read_messages(fields)
    limit = fields.integer("max_completion_tokens", 1, MAX_TOKENS)
    older_limit = fields.integer("max_tokens", 1, MAX_TOKENS)
    top_logprobs = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    logprobs = fields.boolean("logprobs")
    if top_logprobs is not None and not logprobs:
        raise fields.error("top_logprobs", "needs logprobs: true")
    tools = read_tools(fields)
    refuse_functions(fields)
    fields.refuse(_UNSUPPORTED_IN_CHATS)
    template = _template_options(fields)
    wanted = limit if limit is not None else older_limit
    common = _common(fields, wanted, (top_logprobs or 0) if logprobs else None)
    return ChatRequest(common, messages, template, tools)


def read_completion(fields: Fields) -> CompletionRequest:
    """Read a body of /v1/completions. Raises ApiError."""
    prompts = _prompts(fields)
    limit = fields.integer("max_tokens", 0, MAX_TOKENS)
    logprobs = fields.integer("logprobs", 0, MAX_COMPLETION_LOGPROBS)
    echo = fields.boolean("echo")
    rows = fields.integer("n", 1, MAX_CHOICES) or 1
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    if best_of not in (None, rows):
        raise fields.error("best_of", "is not supported beyond n: leave it out")
    if len(prompts) * rows > MAX_ROWS:
        raise fields.error("n", f"asks for more than {MAX_ROWS} answers at once")
    fields.refuse(_UNSUPPORTED_IN_COMPLETIONS)
    return CompletionRequest(_common(fields, COMPLETION_TOKENS if limit is None else limit, logprobs), prompts, echo)


def _common(fields: Fields, max_tokens: int | None, top_logprobs: int | None) -> CommonFields:
    stream = fields.boolean("stream")
    options = fields.group("stream_options")
    include_usage = include_chain = continuous_usage = False
    if options is not None:
        if not stream:
            raise fields.error("stream_options", "needs stream: true")
        include_usage = options.boolean("include_usage")
        # Our own addition for people who watch the chain: the peers that compute the answer (spec/local-api.md).
        include_chain = options.boolean("include_chain")
        # vLLM's addition: each piece has the usage so far.
        continuous_usage = options.boolean("continuous_usage_stats")
        options.ignore("include_obfuscation")
        options.refuse_others()
    common = CommonFields(
        model=fields.required_text("model"),
        max_tokens=max_tokens,
        rows=fields.integer("n", 1, MAX_CHOICES) or 1,
        stop=_stops(fields),
        stream=stream,
        include_usage=include_usage,
        include_chain=include_chain,
        continuous_usage=continuous_usage and include_usage,
        top_logprobs=top_logprobs,
        sampling=read_sampling(fields),
        stop_token_ids=_stop_tokens(fields),
        ignore_eos=fields.boolean("ignore_eos"),
        grammar=read_grammar(fields),
    )
    fields.refuse(_UNSUPPORTED)
    fields.ignore(*_WITHOUT_EFFECT)
    fields.refuse_others()
    return common


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else value or []
    fits = isinstance(stops, list) and len(stops) <= MAX_STOPS and all(isinstance(stop, str) and stop for stop in stops)
    if not fits:
        raise fields.error("stop", f"must be a string or up to {MAX_STOPS} strings, none of them empty")
    return tuple(stops)


def _stop_tokens(fields: Fields) -> tuple[int, ...]:
    value = fields.take("stop_token_ids") or []
    if value and not (is_token_ids(value) and len(value) <= MAX_STOP_TOKENS):
        raise fields.error("stop_token_ids", f"must be up to {MAX_STOP_TOKENS} token ids", code="invalid_value")
    return tuple(value)


def _template_options(fields: Fields) -> TemplateOptions:
    group = fields.group("chat_template_kwargs")
    variables = {name: group.take(name) for name in group.names()} if group is not None else {}
    if group is not None and (reserved := sorted(_RENDERER_S & variables.keys())):
        raise group.error(reserved[0], "is not for the template: it has a field of its own")
    fields.refuse({"chat_template": None})
    effort = fields.text("reasoning_effort")
    if effort == "none":
        # What the templates of models that reason unless told otherwise commonly ask for.
        variables, effort = {"enable_thinking": False} | variables, None
    continues = fields.boolean("continue_final_message")
    # As in vLLM, a client that continues a message must not ask for the beginning of another.
    opens = fields.boolean("add_generation_prompt")
    if fields.take("add_generation_prompt") is None:
        opens = not continues
    if continues and opens:
        raise fields.error("continue_final_message", "excludes add_generation_prompt: send that as false")
    return TemplateOptions(variables, effort, opens, continues)


def _prompts(fields: Fields) -> list[str | list[int]]:
    value = fields.take("prompt")
    if isinstance(value, str) or is_token_ids(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(one, str) or is_token_ids(one) for one in value):
        return value
    raise fields.error("prompt", "must be a string, token ids, or a list of such; none of them empty")


def is_token_ids(value: object) -> bool:
    """Whether a value is a list of numbers that could be token ids, and not empty."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in value)
    )
