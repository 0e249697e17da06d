"""Starting, dying, disconnecting: what clients see, and what the engine keeps running."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
import openai
import pytest

from moe_engine.errors import CheckpointError
from tests.unit.server.conftest import MODEL, running_server

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": MODEL, "prompt": ["Hello", "there"], "max_tokens": 40}


def test_ready_server_reports_health_and_model(live):
    assert live.http.get("/health").json() == {"status": "ready", "reason": None}
    (card,) = live.openai.models.list().data
    assert (card.id, card.object, card.owned_by) == (MODEL, "model", "moe_engine")
    assert card.max_model_len == 64
    assert live.openai.models.retrieve(MODEL) == card


def test_everything_but_metrics_is_503_while_loading(engine):
    engine.hold_start = asyncio.Event()
    with running_server(engine, wait_ready=False) as live:
        assert live.http.get("/health").status_code == 503
        assert live.http.get("/health").json()["status"] == "starting"
        for reply in (live.complete(), live.chat(), live.http.get("/v1/models")):
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "engine_not_ready"
        assert live.http.get("/metrics").status_code == 200
        live.call(engine.hold_start.set)
        live.wait_until(lambda: engine.state == "ready")
        assert live.complete().status_code == 200
    assert engine.was_shut_down


def test_shutdown_while_loading_does_not_wait_for_the_load(engine):
    engine.hold_start = asyncio.Event()
    with running_server(engine, wait_ready=False):
        pass
    assert engine.was_shut_down


def test_failed_start_is_reported_as_dead(engine):
    engine.start_error = CheckpointError("no such tensor")
    with running_server(engine, wait_ready=False) as live:
        live.wait_until(lambda: engine.state == "dead")
        assert live.http.get("/health").json()["status"] == "dead"
        assert live.complete().status_code == 503


def test_dead_engine_is_503_with_the_reason_but_no_traceback(live):
    live.call(live.engine.die)
    health = live.http.get("/health")
    assert health.status_code == 503
    assert health.json() == {"status": "dead", "reason": "rank 3 was killed"}
    for reply in (live.complete(), live.chat(stream=True)):
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "engine_dead"
        assert "rank 3 was killed" in reply.json()["error"]["message"]
        assert "secret" not in reply.text


def test_engine_that_dies_before_the_first_token_is_503_even_in_a_stream(live):
    live.engine.die_after = 0
    assert live.complete(stream=True).status_code == 503


def test_engine_that_dies_in_a_whole_answer_is_503(live):
    live.engine.die_after = 3
    assert live.complete().status_code == 503


def test_engine_that_dies_in_a_stream_sends_an_error_event_and_closes(live):
    live.engine.die_after = 3
    reply = live.complete(stream=True)
    assert reply.status_code == 200
    events = reply.text.strip().split("\n\n")
    assert "[DONE]" not in reply.text
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert error["code"] == "engine_dead"
    assert "rank 3" in error["message"]
    assert len(events) > 1


def test_official_client_raises_when_a_stream_breaks(live):
    live.engine.die_after = 3
    stream = live.openai.chat.completions.create(**CHAT, stream=True)
    with pytest.raises(openai.APIError, match="rank 3 was killed"):
        list(stream)


@pytest.mark.parametrize(
    ("path", "body", "num_requests"),
    [("/v1/chat/completions", CHAT, 1), ("/v1/completions", COMPLETION, 2)],
)
def test_closing_a_stream_frees_its_requests(live, path, body, num_requests):
    live.engine.delay_s = 0.02
    with live.http.stream("POST", path, json={**body, "stream": True}) as reply:
        chunks = reply.iter_raw()  # closes the connection when it is collected
        next(chunks)
        assert len(live.engine.active) == num_requests
    live.wait_until(lambda: not live.engine.active)
    assert len(live.engine.aborted) == num_requests


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_gives_up_waiting_frees_its_requests(live, stream):
    live.engine.delay_s = 60.0
    with pytest.raises(httpx.ReadTimeout):
        live.http.post("/v1/completions", json={**COMPLETION, "stream": stream}, timeout=0.3)
    live.wait_until(lambda: not live.engine.active)
    assert len(live.engine.aborted) == 2


def test_client_that_leaves_is_counted_as_abort(fresh):
    fresh.engine.delay_s = 60.0
    with pytest.raises(httpx.ReadTimeout):
        fresh.http.post("/v1/completions", json=COMPLETION, timeout=0.3)
    fresh.wait_until(lambda: not fresh.engine.active)
    assert 'request_success_total{finished_reason="abort",model_name="org/fake-model"} 2.0' in (
        fresh.http.get("/metrics").text
    )


def test_one_client_leaving_does_not_disturb_another(live):
    live.engine.delay_s = 0.01
    replies = []
    other = threading.Thread(target=lambda: replies.append(live.complete(max_tokens=30)))
    other.start()
    with live.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as reply:
        next(reply.iter_raw())
    other.join(10)
    assert replies[0].json()["usage"]["completion_tokens"] == 30
    assert len(live.engine.aborted) == 1


def test_refused_prompt_of_a_batch_frees_the_others(live, monkeypatch):
    live.engine.delay_s = 60.0
    original = live.engine.generate

    def generate(prompt, params, request_id):
        if prompt == [66]:
            live.engine.refusal = ValueError("no")
        return original(prompt, params, request_id)

    monkeypatch.setattr(live.engine, "generate", generate)
    reply = live.complete(prompt=["A", "B"])
    assert reply.status_code == 500
    live.wait_until(lambda: not live.engine.active)


@pytest.mark.parametrize(
    ("offered", "is_kept"), [("trace-42", True), ("bad id", False), ("x" * 129, False)]
)
def test_request_id_is_taken_over_or_made_up(live, offered, is_kept):
    for reply in (
        live.http.get("/health", headers={"X-Request-Id": offered}),
        live.http.get("/nowhere", headers={"X-Request-Id": offered}),
    ):
        returned = reply.headers["x-request-id"]
        assert (returned == offered) is is_kept
        assert returned
    ids = {live.http.get("/health").headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2


def test_long_texts_do_not_block_the_event_loop(live, monkeypatch):
    entered, release = threading.Event(), threading.Event()

    def encode(text, add_special_tokens=True):
        entered.set()
        release.wait(5)
        return [65]

    monkeypatch.setattr(live.engine.tokenizer, "encode", encode)
    slow = threading.Thread(target=lambda: live.complete(max_tokens=1))
    slow.start()
    assert entered.wait(5)
    assert live.http.get("/health", timeout=2).status_code == 200
    release.set()
    slow.join(5)
