"""Every bad request gets a 4xx with an OpenAI error object that names what was wrong."""

from __future__ import annotations

import openai
import pytest

from moe_engine.errors import InvalidRequestError
from moe_engine.types.sampling import MAX_N, MAX_STOP_STRINGS
from tests.unit.server.conftest import MODEL


def check_error(reply, status, param, *words, code=None):
    assert reply.status_code == status, reply.text
    assert reply.json().keys() == {"error"}
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", ["empty"]),
        ({"prompt": []}, "prompt", ["at least one"]),
        ({"prompt": [[]]}, "prompt[0]", ["at least one"]),
        ({"prompt": ["a", ""]}, "prompt[1]", ["empty"]),
        ({"prompt": ["a", 1]}, "prompt[1]", ["string"]),
        ({"prompt": [1, "a"]}, "prompt[1]", ["token id", "'a'"]),
        ({"prompt": [1, True]}, "prompt[1]", ["token id", "true"]),
        ({"prompt": [-1]}, "prompt[0]", ["token id", "-1"]),
        ({"prompt": [[1], [2, 1.0]]}, "prompt[1][1]", ["1.0"]),
        ({"prompt": [1, 260]}, "prompt", ["260", "0 to 259"]),
        ({"prompt": ["a"] * 2049}, "prompt", ["2048", "2049"]),
        ({"prompt": {}}, "prompt", ["string"]),
        ({"prompt": None}, "prompt", ["string"]),
        ({"temperature": 2.5}, "temperature", ["2.5", "equal to 2"]),
        ({"temperature": -0.1}, "temperature", ["-0.1", "equal to 0"]),
        ({"temperature": "1"}, "temperature", ["number", "'1'"]),
        ({"temperature": True}, "temperature", ["number", "true"]),
        ({"top_p": 0}, "top_p", ["greater than 0"]),
        ({"top_p": 1.5}, "top_p", ["1.5", "equal to 1"]),
        ({"top_k": -2}, "top_k", ["-2", "-1"]),
        ({"temperature": 10**400}, "temperature", ["10000"]),
        ({"logit_bias": {"5": 10**400}}, "logit_bias.5", ["10000"]),
        ({"top_k": 10**30}, "top_k", ["10000"]),
        ({"min_p": 1.1}, "min_p", ["1.1"]),
        ({"presence_penalty": 2.1}, "presence_penalty", ["2.1", "equal to 2"]),
        ({"frequency_penalty": -3}, "frequency_penalty", ["-3", "-2"]),
        ({"repetition_penalty": 0}, "repetition_penalty", ["greater than 0"]),
        ({"n": 0}, "n", ["equal to 1"]),
        ({"n": MAX_N + 1}, "n", [str(MAX_N), str(MAX_N + 1)]),
        ({"n": True}, "n", ["integer", "true"]),
        ({"n": 1.0}, "n", ["integer"]),
        ({"seed": 2**63}, "seed", [str(2**63)[:8]]),
        ({"stop": ["x"] * (MAX_STOP_STRINGS + 1)}, "stop", [str(MAX_STOP_STRINGS)]),
        ({"stop": "x" * 1025}, "stop", ["1024"]),
        ({"stop": ""}, "stop", ["at least 1"]),
        ({"stop": ["a", 3]}, "stop[1]", ["string", "3"]),
        ({"stop_token_ids": [260]}, "stop_token_ids", ["260", "259"]),
        ({"logit_bias": {"260": 1}}, "logit_bias", ["260", "259"]),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", ["'x'"]),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", ["101", "100"]),
        ({"max_tokens": 0}, "max_tokens", ["0", "echo"]),
        ({"max_tokens": -1}, "max_tokens", ["-1"]),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", ["5", "4"]),
        ({"logprobs": 21}, "logprobs", ["21", "20"]),
        ({"best_of": 2}, "best_of", ["2", "n = 1"]),
        ({"suffix": "x"}, "suffix", ["Not supported", "'x'"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream"]),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", ["unknown field"]),
        ({"temprature": 1}, "temprature", ["unknown field temprature"]),
        ({"model": None}, "model", ["string"]),
    ],
)
def test_completion_fields_are_refused_by_name(live, fields, param, words):
    check_error(live.complete(**fields), 400, param, *words)


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", ["at least 1"]),
        ({"messages": "Hi"}, "messages", ["list"]),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]", ["robot"]),
        ({"messages": [{"role": "user"}]}, "messages[0].content", ["required"]),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", ["string", "5"]),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "messages[0].content[0].type",
            ["Not supported", "image_url"],
        ),
        ({"messages": [{"role": "assistant"}]}, "messages", ["content or tool_calls"]),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, "messages", ["template"]),
        ({"tools": [{"type": "function"}]}, "tools", ["Not supported"]),
        ({"tool_choice": "auto"}, "tool_choice", ["Not supported", "'auto'"]),
        (
            {"response_format": {"type": "json_object"}},
            "response_format.type",
            ["Not supported", "json_object"],
        ),
        ({"top_logprobs": 2}, "top_logprobs", ["logprobs is not true"]),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["21", "20"]),
        ({"logprobs": 1}, "logprobs", ["boolean"]),
        ({"max_tokens": 0}, "max_tokens", ["equal to 1"]),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", ["1", "2"]),
        ({"chat_template_kwargs": {"tools": "x"}}, "chat_template_kwargs", ["tools"]),
        ({"store": True}, "store", ["Not supported", "true"]),
        ({"service_tier": "flex"}, "service_tier", ["Not supported", "flex"]),
        ({"reasoning_effort": "high"}, "reasoning_effort", ["Not supported"]),
        ({"modalities": ["audio"]}, "modalities", ["Not supported"]),
    ],
)
def test_chat_fields_are_refused_by_name(live, fields, param, words):
    check_error(live.chat(**fields), 400, param, *words)


def test_limits_of_the_context_name_both_numbers(live):
    exceeded = "context_length_exceeded"
    check_error(live.complete(prompt="x" * 64), 400, "prompt", "64 tokens", code=exceeded)
    reply = live.complete(prompt="x" * 60, max_tokens=5)
    check_error(reply, 400, "max_tokens", "64", "60", "is 5", "at most 4", code=exceeded)
    assert live.complete(prompt="x" * 60, max_tokens=4).status_code == 200
    long_chat = [{"role": "user", "content": "x" * 80}]
    reply = live.chat(messages=long_chat)
    check_error(reply, 400, "messages", "96 tokens", "64", code=exceeded)
    reply = live.chat(max_tokens=60)
    check_error(reply, 400, "max_tokens", "60", "18", code=exceeded)


def test_hopelessly_long_text_is_refused_without_tokenising(live, monkeypatch):
    tokenizer = live.engine.tokenizer
    monkeypatch.setattr(tokenizer, "encode", lambda *_, **__: pytest.fail("tokenised"))
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *_, **__: pytest.fail("rendered"))
    longest_token = len("<|256|>")
    text = "x" * (64 * longest_token + 1)
    exceeded = "context_length_exceeded"
    check_error(live.complete(prompt=text), 400, "prompt", "449", "448", code=exceeded)
    reply = live.chat(messages=[{"role": "user", "content": text}])
    check_error(reply, 400, "messages", "448", code=exceeded)


def test_unknown_model_is_404(live):
    for reply in (live.complete(model="gpt-4"), live.chat(model="gpt-4")):
        check_error(reply, 404, "model", "gpt-4", MODEL, code="model_not_found")
    reply = live.http.get("/v1/models/gpt-4")
    check_error(reply, 404, "model", "gpt-4", code="model_not_found")


def test_official_client_raises_its_own_errors(live):
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        live.openai.completions.create(model=MODEL, prompt="x", temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        live.openai.chat.completions.create(model="x", messages=[{"role": "user", "content": ""}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):  # before the stream has begun
        live.openai.completions.create(model=MODEL, prompt="", stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_engines_refusal_keeps_its_status_code_and_param(live, stream):
    live.engine.refusal = InvalidRequestError(
        "5000 blocks needed, 10 exist", param="prompt", status=422, code="too_large"
    )
    check_error(live.complete(stream=stream), 422, "prompt", "5000", code="too_large")


def test_unexpected_error_is_logged_and_tells_the_client_nothing(live, caplog):
    live.engine.refusal = KeyError("secret")
    reply = live.complete()
    check_error(reply, 500, None, code="internal_error")
    assert "secret" not in reply.text
    assert f"unexpected error in request {reply.headers['x-request-id']}" in caplog.text
    assert "KeyError: 'secret'" in caplog.text
    assert live.http.get("/health").status_code == 200


def test_unknown_route_and_wrong_method(live):
    check_error(live.http.get("/v1/engines"), 404, None, "/v1/engines")
    check_error(live.http.post("/v1/models/"), 405, None)
    reply = live.http.get("/v1/completions")
    check_error(reply, 405, None, "GET /v1/completions")
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'"text"', b"5"])
def test_body_must_be_an_object(live, body):
    headers = {"Content-Type": "application/json"}
    reply = live.http.post("/v1/completions", content=body, headers=headers)
    assert reply.status_code == 400
    assert "request body" in reply.json()["error"]["message"]
