"""A chat's next turn over the API takes up the session of the last one."""

from __future__ import annotations

TEXT = "Once upon a time there was a peer. " * 3


async def turns(caller):
    """Two turns of a chat: the second's cached tokens, all its tokens, and what it says."""
    messages = [{"role": "user", "content": TEXT}]
    for _ in range(2):
        answer = await caller.post("/v1/chat/completions", {"model": "bytes", "messages": messages, "max_tokens": 8})
        said = answer.json["choices"][0]["message"]["content"]
        usage = answer.json["usage"]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
    return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"], said


async def test_the_next_turn_says_what_was_cached_and_answers_the_same(open_api):
    async with open_api() as (caller, _):
        nothing, _, plain = await turns(caller)
    async with open_api(kept_positions=8192) as (caller, _):
        cached, prompt, said = await turns(caller)
    assert nothing == 0
    assert len(TEXT) < cached < prompt
    assert said == plain


async def test_anthropics_usage_counts_it_apart(open_api):
    async with open_api(kept_positions=8192) as (caller, _):
        for _ in range(2):
            body = {"model": "bytes", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 8}
            answer = await caller.post("/v1/messages", body)
    usage = answer.json["usage"]
    assert usage["cache_read_input_tokens"] > len(TEXT)
    assert usage["input_tokens"] == 1
