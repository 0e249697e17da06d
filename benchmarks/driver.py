"""Runs batches of token-id prompts through `MoEEngine` and notes when each token arrived."""

from __future__ import annotations

import itertools
import queue
import random
import statistics
import time
from dataclasses import dataclass

from moe_engine import MoEEngine, SamplingParams
from moe_engine.engine.frontend import News

Request = tuple[list[int], int]
"""A prompt and how many tokens shall follow it."""


@dataclass(frozen=True)
class Run:
    """Requests that were served to the end; all at once, where steps are asked about.

    Attributes:
        seconds: from the first prompt handed over to the last token received.
        arrivals: per prompt, `time.perf_counter` of each of its tokens.
        token_ids: per prompt, its output.
    """

    seconds: float
    arrivals: list[list[float]]
    token_ids: list[tuple[int, ...]]

    def step_seconds(self) -> list[float]:
        """Intervals between tokens while all prompts decode together; empty if they never do.

        The batch is decoding from the last first token to the first last token; the tokens of the
        prompt that was last to start mark the steps between.
        """
        last_start = max(self.arrivals, key=lambda times: times[0])
        end = min(times[-1] for times in self.arrivals)
        steps = [at for at in last_start if at <= end]
        return [after - before for before, after in itertools.pairwise(steps)]

    def share_of_distinct_tokens(self) -> float:
        """How many of the tokens that are sampled at once differ, 1 if all do.

        Greedy decoding of random weights soon repeats itself, and sequences that have the same
        token need the same experts, so a step reads less than one of as many different tokens.
        """
        steps = list(zip(*self.token_ids, strict=True))
        return statistics.mean(len(set(step)) / len(step) for step in steps)


def run_batch(
    engine: MoEEngine, prompts: list[list[int]], num_tokens: int, temperature: float = 0.0
) -> Run:
    """Hand over all prompts at once, for ``num_tokens`` each, past any end-of-sequence token."""
    return run_streams(engine, [[(prompt, num_tokens)] for prompt in prompts], temperature)


def run_streams(engine: MoEEngine, streams: list[list[Request]], temperature: float = 0.0) -> Run:
    """Serve streams of requests, each of which is handed over when the one before it has ended.

    What `MoEEngine.generate` does, with a clock where the engine's news arrive.

    Args:
        streams: the requests of each, one at least.

    Returns:
        Those of a stream one after the other.
    """
    work = [request for requests in streams for request in requests]
    arrivals: list[list[float]] = [[] for _ in work]
    news: queue.SimpleQueue[tuple[int, News]] = queue.SimpleQueue()
    opened = {}

    def hand_over(number: int) -> None:
        prompt, num_tokens = work[number]

        def put(item: News) -> None:
            arrivals[number].append(time.perf_counter())
            news.put((number, item))

        params = SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True)
        opened[number] = engine._open(prompt, params, put)

    ends = list(itertools.accumulate(len(requests) for requests in streams))
    start = time.perf_counter()
    for first in [0, *ends[:-1]]:
        hand_over(first)
    num_open = len(streams)
    while num_open:
        number, item = news.get()
        opened[number].handle(item)
        if opened[number].finished:
            if number + 1 in ends:
                num_open -= 1
            else:
                hand_over(number + 1)
    seconds = time.perf_counter() - start
    outputs = [opened[i].assembler.final().outputs[0].token_ids for i in range(len(work))]
    asked = [num_tokens for _, num_tokens in work]
    assert [len(tokens) for tokens in outputs] == asked, "an output ended early"
    return Run(seconds, arrivals, outputs)


def random_prompts(
    num_prompts: int, num_tokens: int, vocab_size: int, seed: int
) -> list[list[int]]:
    """Uniform token ids, the same for the same seed."""
    choose = random.Random(seed)
    return [choose.choices(range(vocab_size), k=num_tokens) for _ in range(num_prompts)]


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of the values lie; nan if there are none."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]
