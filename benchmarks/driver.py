"""Runs batches of token-id prompts through `MoEEngine` and notes when each token arrived."""

from __future__ import annotations

import itertools
import queue
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from moe_engine import MoEEngine, SamplingParams
from moe_engine.engine.frontend import News


@dataclass(frozen=True)
class Run:
    """One batch, handed over at once and served to the end.

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
    engine: MoEEngine,
    prompts: list[list[int]],
    num_tokens: int | Sequence[int],
    temperature: float = 0.0,
) -> Run:
    """Decode past any end-of-sequence token.

    What `MoEEngine.generate` does, with a clock where the engine's news arrive.

    Args:
        num_tokens: of every output, or of each.
    """
    sizes = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else num_tokens
    arrivals: list[list[float]] = [[] for _ in prompts]
    news: queue.SimpleQueue[tuple[int, News]] = queue.SimpleQueue()
    start = time.perf_counter()
    requests = []
    for number, (prompt, size) in enumerate(zip(prompts, sizes, strict=True)):
        params = SamplingParams(temperature=temperature, max_tokens=size, ignore_eos=True)

        def put(item: News, number: int = number) -> None:
            arrivals[number].append(time.perf_counter())
            news.put((number, item))

        requests.append(engine._open(prompt, params, put))
    num_open = len(requests)
    while num_open:
        number, item = news.get()
        requests[number].handle(item)
        num_open -= requests[number].finished
    seconds = time.perf_counter() - start
    outputs = [request.assembler.final().outputs[0].token_ids for request in requests]
    assert [len(tokens) for tokens in outputs] == list(sizes), "an output ended early"
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
