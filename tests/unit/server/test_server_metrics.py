"""Prometheus metrics."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from moe_engine.server.metrics import RequestTimer, ServerMetrics
from moe_engine.types.messages import EngineStats
from moe_engine.types.results import CompletionOutput, FinishReason, RequestOutput


def read(text: str) -> dict[str, float]:
    """Sample name, with the reason if it has one -> value."""
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "le" not in sample.labels:
                reason = sample.labels.get("finished_reason", "")
                values[sample.name.removeprefix("moe_engine:") + reason] = sample.value
                assert sample.labels["model_name"]
    return values


def output(*completions: tuple[int, int, FinishReason | None]) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        prompt_token_ids=(1,),
        outputs=tuple(
            CompletionOutput(index, "", tuple(range(num_tokens)), reason)
            for index, num_tokens, reason in completions
        ),
        finished=completions[0][2] is not None,
    )


def test_engine_stats_are_read_at_scrape_time():
    stats = EngineStats(
        num_waiting=1,
        num_running=2,
        num_blocks=10,
        num_free_blocks=4,
        num_steps_total=3,
        num_preemptions_total=5,
        prompt_tokens_total=6,
        generation_tokens_total=7,
        prefix_queried_tokens_total=8,
        prefix_hit_tokens_total=9,
    )
    current = [EngineStats()]
    metrics = ServerMetrics(lambda: current[0], "m")
    assert read(metrics.render().decode())["kv_cache_usage_perc"] == 0
    current[0] = stats
    values = read(metrics.render().decode())
    expected = {
        "num_requests_waiting": 1,
        "num_requests_running": 2,
        "kv_cache_usage_perc": 0.6,
        "engine_steps_total": 3,
        "num_preemptions_total": 5,
        "prompt_tokens_total": 6,
        "generation_tokens_total": 7,
        "prefix_cache_queries_total": 8,
        "prefix_cache_hits_total": 9,
    }
    assert {name: values[name] for name in expected} == expected


def test_latencies_of_a_request_with_two_completions():
    metrics = ServerMetrics(EngineStats, "m")
    now = [10.0]
    timer = RequestTimer(metrics, clock=lambda: now[0])
    now[0] = 12.0
    timer.observe(output((0, 0, None)))  # nothing yet
    now[0] = 13.0
    timer.observe(output((0, 1, None), (1, 1, None)))
    now[0] = 15.0
    timer.observe(output((0, 4, FinishReason.LENGTH), (1, 1, FinishReason.STOP)))
    values = read(metrics.render().decode())
    assert values["time_to_first_token_seconds_count"] == 1
    assert values["time_to_first_token_seconds_sum"] == 3.0
    assert values["inter_token_latency_seconds_count"] == 5  # 4 tokens in 0.5 s each, 1 in 2 s
    assert values["inter_token_latency_seconds_sum"] == 4.0
    assert values["e2e_request_latency_seconds_sum"] == 5.0
    assert values["request_success_totallength"] == 1
    assert values["request_success_totalstop"] == 1
    assert values["request_success_totalabort"] == 0


def test_two_servers_do_not_share_a_registry():
    first, second = ServerMetrics(EngineStats, "a"), ServerMetrics(EngineStats, "b")
    first.time_to_first_token.observe(1)
    assert read(second.render().decode())["time_to_first_token_seconds_count"] == 0


def test_metrics_endpoint_counts_served_requests(fresh):
    fresh.complete(n=2, max_tokens=3)
    reply = fresh.http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    values = read(reply.text)
    assert values["request_success_totallength"] == 2
    assert values["time_to_first_token_seconds_count"] == 1
    assert values["inter_token_latency_seconds_count"] == 4
    assert values["num_requests_running"] == 3
