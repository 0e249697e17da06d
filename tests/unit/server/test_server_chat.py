"""/v1/chat/completions with the official client."""

from __future__ import annotations

import json

import pytest

from tests.unit.server.conftest import MODEL
from tests.unit.server.fake_engine import TEXT

ASK = [{"role": "user", "content": "Hi"}]


def prompt_of(live) -> str:
    return bytes(live.engine.seen[-1][0]).decode()


def test_answer_has_openai_shape(live):
    reply = live.openai.chat.completions.create(model=MODEL, messages=ASK, max_tokens=4)
    assert reply.id.startswith("chatcmpl-")
    assert reply.object == "chat.completion"
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == TEXT[:3] + "\ufffd"  # the fourth byte is half of "ö"
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert reply.usage.prompt_tokens == len("user:Hi\nassistant:")
    assert reply.usage.completion_tokens == 4


def test_roles_parts_and_history_reach_the_template(live):
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    reply = live.chat(messages=messages, max_tokens=1)
    assert reply.status_code == 200, reply.text
    assert prompt_of(live) == "system:be kind\nuser:a\nb\nassistant:\ntool:42\nassistant:"


def test_template_options(live):
    reply = live.chat(
        add_generation_prompt=False, chat_template_kwargs={"enable_thinking": False}, max_tokens=1
    )
    assert reply.status_code == 200
    assert prompt_of(live) == "user:Hi\nenable_thinking=False\n"


def test_default_limit_is_the_rest_of_the_context(live):
    reply = live.chat().json()
    assert reply["usage"]["total_tokens"] == live.engine.info.max_model_len


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_limit_under_both_names(live, name):
    assert live.chat(**{name: 3}).json()["usage"]["completion_tokens"] == 3


def test_logprobs_have_bytes_and_alternatives(live):
    reply = live.openai.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=4, logprobs=True, top_logprobs=2
    )
    content = reply.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["S", "c", "h", "\ufffd"]
    assert [entry.bytes for entry in content] == [[83], [99], [104], [0xC3]]
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [
        ("S", -0.5),
        ("T", -1.5),
    ]
    assert live.engine.seen[0][1].logprobs == 2


def test_logprobs_without_alternatives(live):
    content = live.chat(max_tokens=1, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert content == [{"token": "S", "logprob": -0.5, "bytes": [83], "top_logprobs": []}]


def test_stream_brings_role_then_text_then_reason_then_usage(live):
    whole = live.openai.chat.completions.create(model=MODEL, messages=ASK, max_tokens=20, n=2)
    chunks = list(
        live.openai.chat.completions.create(
            model=MODEL,
            messages=ASK,
            max_tokens=20,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    for answer in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == answer.index]
        assert [part.delta.role for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
        text = "".join(part.delta.content or "" for part in parts)
        assert text == answer.message.content
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_streamed_logprobs_equal_the_whole_answers(live):
    whole = live.chat(max_tokens=6, logprobs=True, top_logprobs=1).json()
    reply = live.chat(max_tokens=6, logprobs=True, top_logprobs=1, stream=True)
    events = reply.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    choices = [json.loads(event[6:])["choices"][0] for event in events[:-1]]
    streamed = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    assert streamed == whole["choices"][0]["logprobs"]["content"]


def test_harmless_fields_of_real_clients_are_accepted(live):
    reply = live.chat(
        max_tokens=1,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        safety_identifier="x",
        prompt_cache_key="y",
        stop=None,
        logit_bias=None,
    )
    assert reply.status_code == 200, reply.text
