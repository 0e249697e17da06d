"""Prometheus metrics: the engine's counters, and latencies as the front end sees them.

Names follow vLLM's with the prefix ``moe_engine:``, so that its dashboards need one replacement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moe_engine.types.messages import EngineStats
from moe_engine.types.results import FinishReason, RequestOutput

PREFIX = "moe_engine:"
_LABELS = ("model_name",)
_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 40, 160)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_E2E_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)


class _EngineCollector(Collector):
    """Reads `EngineStats` when Prometheus asks."""

    def __init__(self, read_stats: Callable[[], EngineStats], model_name: str) -> None:
        self._read_stats = read_stats
        self._labels = (model_name,)

    def collect(self) -> Iterator[Metric]:
        stats = self._read_stats()
        used = 1.0 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        gauges = (
            ("num_requests_running", "Sequences in the running batch.", stats.num_running),
            ("num_requests_waiting", "Sequences waiting for admission.", stats.num_waiting),
            ("kv_cache_usage_perc", "Used share of the KV blocks, 0 to 1.", used),
        )
        counters = (
            ("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens_total),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens_total),
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_queried_tokens_total,
            ),
            (
                "prefix_cache_hits",
                "Prompt tokens found in the prefix cache.",
                stats.prefix_hit_tokens_total,
            ),
            ("num_preemptions", "Sequences preempted.", stats.num_preemptions_total),
            ("engine_steps", "Steps executed.", stats.num_steps_total),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(PREFIX + name, text, labels=_LABELS)
            counter.add_metric(self._labels, value)
            yield counter


class ServerMetrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, read_stats: Callable[[], EngineStats], model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(read_stats, model_name))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            whole = Histogram(
                PREFIX + name, text, _LABELS, registry=self._registry, buckets=buckets
            )
            return whole.labels(model_name)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            _TTFT_BUCKETS,
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between two tokens of an output.", _ITL_BUCKETS
        )
        self.e2e_latency = histogram(
            "e2e_request_latency_seconds",
            "From the request's arrival to its last token.",
            _E2E_BUCKETS,
        )
        successes = Counter(
            PREFIX + "request_success",
            "Outputs that ended, by reason; abort: the client went away.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self.finished = {reason: successes.labels(model_name, reason) for reason in FinishReason}

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


class RequestTimer:
    """Observes the latencies of one engine request, from its creation on."""

    def __init__(self, metrics: ServerMetrics, clock: Callable[[], float] = time.perf_counter):
        self._metrics = metrics
        self._clock = clock
        self._start = clock()
        self._last_token: dict[int, float] = {}  # per completion of the request

    def observe(self, output: RequestOutput) -> None:
        """Take note of a streamed output."""
        now = self._clock()
        for completion in output.outputs:
            num_tokens = len(completion.token_ids)
            if num_tokens and not self._last_token:
                self._metrics.time_to_first_token.observe(now - self._start)
            if num_tokens and completion.index in self._last_token:
                # Tokens that arrive together share the time since the one before them.
                gap = (now - self._last_token[completion.index]) / num_tokens
                for _ in range(num_tokens):
                    self._metrics.inter_token_latency.observe(gap)
            if num_tokens:
                self._last_token[completion.index] = now
            if completion.finish_reason is not None:
                self._metrics.finished[completion.finish_reason].inc()
        if output.finished:
            self._metrics.e2e_latency.observe(now - self._start)

    def aborted(self) -> None:
        """Take note that the client did not wait for the end."""
        self._metrics.finished[FinishReason.ABORT].inc()
