"""Makes the prompt of a chat: its messages and tools in the model's chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peerd.api.errors import invalid
from peerd.api.openai.chat_templates import ChatTemplates
from peerd.api.openai.grammar_fields import AskedGrammar
from peerd.api.openai.requests import ChatRequest
from peerd.api.openai.tool_calls.forms import Form, form_of
from peerd.api.openai.tool_calls.reading import Reading, reading_of
from peerd.api.openai.tool_calls.rules import Calls, Thinking, answer_grammar
from peerd.api.openai.tool_calls.thoughts import THINK_MARKS
from peerd.client.token_bytes import special_ids
from peerd.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from peerd.client.model import SwarmModel

_PROBE = [{"role": "user", "content": "Hi"}]
_SHORT_ID_LENGTH = 9


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The prompt. `reading`: how thoughts and calls are found in the answer; None if it is plain text. `grammar`: the
    answer's, with its thoughts and calls; None if it may be anything.
    """

    text: str
    reading: Reading | None
    grammar: AskedGrammar | None


async def chat_prompt(model: SwarmModel, wanted: ChatRequest, templates: ChatTemplates) -> ChatPrompt:
    """The conversation as the model reads it. Raises ApiError, InvalidRequest."""
    name, options = wanted.common.model, wanted.template
    if not model.tokenizer.chat_template:
        raise InvalidRequest(f"{name} has no chat template: use /v1/completions")
    tools = None if wanted.tools is None else wanted.tools.tools
    # Some models have a template of their own for tools.
    template = model.tokenizer.get_chat_template(tools=tools)
    variables = _variables(model, wanted, template)
    form = form_of(template)
    if tools is not None:
        offer = _offer(template, tools)
        await _check_tools(name, templates, template, variables, offer)
        if form is None:
            raise _refused(f"{name} writes calls in a form that is not known here: leave tools out", "tools")
        variables |= offer
    messages = [_for_template(message, form) for message in wanted.messages]
    if "tool_calls" not in template and any("tool_calls" in message for message in messages):
        if form is None or form.write is None:
            raise _refused(f"{name}'s chat template does not use tool_calls: leave such messages out", "messages")
        messages = [_written(message, form.write) for message in messages]
    text = await templates.render(
        template,
        messages,
        variables,
        opens_answer=options.opens_answer,
        continues_last=options.continues_last,
    )
    schemas = None if wanted.tools is None else wanted.tools.schemas
    inside = _is_thinking(wanted, text)
    reading = reading_of(template, form, schemas, begins_inside=inside)
    return ChatPrompt(text, reading, _grammar(model, wanted, template, form, inside))


def _grammar(
    model: SwarmModel, wanted: ChatRequest, template: str, form: Form | None, begins_inside: bool
) -> AskedGrammar | None:
    """The grammar of the whole answer. Raises ApiError."""
    asked, tools = wanted.common.grammar, wanted.tools
    must_call = () if tools is None else tools.must_call
    if asked is None and not must_call:
        return None
    param = "tool_choice" if must_call else "tools"
    calls = None
    if tools is not None and form is not None:
        schemas = {name: tools.schemas[name] for name in must_call or tools.schemas}
        calls = Calls(form, schemas, tools.parallel)
        if not calls.can_be_forced:
            problem = f"{wanted.common.model} writes calls in a form that has no grammar here"
            advice = "send auto" if must_call else "send tools, or a form for the answer, but not both"
            raise _refused(f"{problem}: {advice}", param)
    thinking = Thinking(any(mark in template for mark in THINK_MARKS), begins_inside, _has_channels(form))
    special = {str(model.tokenizer.convert_ids_to_tokens(token)) for token in special_ids(model.tokenizer)}
    own = None if must_call or asked is None else asked.grammar
    try:
        grammar = answer_grammar(own, calls, thinking, special)
    except ValueError as error:
        raise invalid(f"{param}: the grammar of its calls {error}", param) from None
    return None if grammar is None else AskedGrammar(grammar, param if own is None or asked is None else asked.param)


def _has_channels(form: Form | None) -> bool:
    return form is not None and form.name == "harmony"


def _is_thinking(wanted: ChatRequest, text: str) -> bool:
    """Whether the prompt leaves a thought open."""
    begin, end = THINK_MARKS
    if wanted.template.continues_last:
        last = wanted.messages[-1]["content"] or ""
        return begin in last and end not in last
    return text.rstrip().endswith(begin)


def _variables(model: SwarmModel, wanted: ChatRequest, template: str) -> dict[str, Any]:
    """What the template may read besides messages and tools. Raises ApiError."""
    variables = {key: value for key, value in model.tokenizer.special_tokens_map.items() if isinstance(value, str)}
    effort = wanted.template.effort
    if effort is not None:
        if "reasoning_effort" not in template:
            raise invalid(f"{wanted.common.model} has no reasoning_effort: leave it out", "reasoning_effort")
        variables["reasoning_effort"] = effort
    return variables | wanted.template.variables


async def _check_tools(
    name: str, templates: ChatTemplates, template: str, variables: dict[str, Any], offer: dict[str, Any]
) -> None:
    """Refuse tools that the model would never see, because its template does not use them."""
    if template not in templates.uses_tools:
        with_tools = await templates.render(template, _PROBE, variables | offer)
        templates.uses_tools[template] = with_tools != await templates.render(template, _PROBE, variables)
    if not templates.uses_tools[template]:
        raise _refused(f"{name}'s chat template does not use tools: leave them out", "tools")


def _offer(template: str, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The variables with which a template is given tools."""
    if "xml_tools" in template:
        # SmolLM3's name for them, without what OpenAI's API puts around a function.
        return {"tools": tools, "xml_tools": [tool["function"] for tool in tools]}
    return {"tools": tools}


def _written(message: dict[str, Any], write: Callable[[str], str]) -> dict[str, Any]:
    """A message with its calls in its text."""
    calls = message.get("tool_calls", [])
    texts = [write(json.dumps(call["function"], ensure_ascii=False)) for call in calls]
    content = "\n".join([message["content"], *texts] if message["content"] else texts)
    return {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}


def _refused(problem: str, param: str) -> Exception:
    return invalid(problem, param, code="unsupported_parameter")


def _for_template(message: dict[str, Any], form: Form | None) -> dict[str, Any]:
    """A message as templates of this form take it."""
    message = dict(message)
    if "reasoning_content" in message:
        # gpt-oss's name for it.
        message["thinking"] = message["reasoning_content"]
    if "tool_call_id" in message:
        message["tool_call_id"] = _template_id(message["tool_call_id"], form)
    if "tool_calls" not in message:
        return message
    reads_text = form is not None and form.reads_text
    message["content"] = message["content"] or (None if reads_text else "")
    message["tool_calls"] = [
        {
            "id": _template_id(call["id"], form),
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": call["function"]["arguments" if reads_text else "values"],
            },
        }
        for call in message["tool_calls"]
    ]
    return message


def _template_id(call_id: str, form: Form | None) -> str:
    """A call's id; where the template takes short ones only, one that is always the same for this call."""
    if form is None or not form.short_ids:
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:_SHORT_ID_LENGTH]
