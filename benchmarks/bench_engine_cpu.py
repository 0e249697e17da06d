"""Throughput of the whole engine on a CPU against Hugging Face transformers.

    python -m benchmarks.bench_engine_cpu [--repetitions N] [--output FILE]

Both run the same random checkpoint in float32, greedily, on all cores, in the same run. First
every output token is compared with transformers' (one prompt at a time, unpadded); nothing is
timed if one differs. Then the repetitions of all contestants alternate, so that whatever else the
machine does hits them alike, and the medians are reported.

- moe_engine: one `MoEEngine` per layout, all prompts in one `generate` call. The prefix cache is
  off, because the repetitions send the same prompts.
- transformers, padded: one left-padded ``generate`` for the whole batch, with the experts
  implementation that a trial finds fastest for that batch.
- transformers, one by one: a ``generate`` per prompt, with the one found fastest for batch 1.

Time to first token is the time of a whole call with one output token.

Both get all cores, and OpenMP threads that sleep while they wait (the engine's own setting for its
ranks): spinning threads would slow both by an order of magnitude whenever another process wants
the same core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

from benchmarks import ceilings, workload
from benchmarks.clock import time_call
from benchmarks.machine import describe_machine, load_average
from benchmarks.report import save_result
from benchmarks.transformers_baseline import TransformersBaseline
from moe_engine import MoEEngine, SamplingParams

RESULTS = Path(__file__).parent / "results" / "engine_cpu.json"
BATCH_SIZES = (1, 8, 32)
NUM_OUTPUT_TOKENS = 32
LAYOUTS = ((1, 1), (2, 1), (1, 2))
FLOAT32_BYTES = 4

Contestant = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and a number of tokens -> the greedy tokens of each prompt."""


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        result = measure(Path(name), arguments.repetitions, stack)
    save_result(arguments.output, result)


def measure(directory: Path, repetitions: int, stack: ExitStack) -> dict[str, Any]:
    """The content of the JSON file."""
    load_before = load_average()
    machine_ceilings = ceilings.run("cpu")
    workload.save_checkpoint(directory)
    baseline = TransformersBaseline(directory)
    engines: dict[str, Contestant] = {}
    for tp, dp in LAYOUTS:
        engine = stack.enter_context(
            MoEEngine(str(directory), tp, dp, device="cpu", dtype="float32", prefix_cache=False)
        )
        engines[f"moe_engine_tp{tp}_dp{dp}"] = as_contestant(engine)
    prompts = workload.make_prompts(max(BATCH_SIZES))
    trials = {size: baseline.try_experts(prompts[:size]) for size in BATCH_SIZES}
    fastest = {size: min(seconds, key=seconds.__getitem__) for size, seconds in trials.items()}
    one_by_one: Contestant = partial(baseline.generate_one_by_one, experts=fastest[1])
    check = check_tokens(one_by_one, engines, prompts)

    batches = []
    for size in BATCH_SIZES:
        contestants: dict[str, Contestant] = {
            **engines,
            "transformers_padded": partial(baseline.generate_padded, experts=fastest[size]),
        }
        if size > 1:
            contestants["transformers_one_by_one"] = one_by_one
        seconds = time_alternately(contestants, prompts[:size], NUM_OUTPUT_TOKENS, repetitions)
        batches.append(summarize(prompts[:size], seconds))
        print(f"{size} requests, output tokens/s: {batches[-1]['output_tokens_per_s']}", flush=True)
    first_token = time_alternately(
        {"moe_engine_tp1_dp1": engines["moe_engine_tp1_dp1"], "transformers_padded": one_by_one},
        prompts[:1],
        1,
        repetitions,
    )
    return {
        "machine": describe_machine(),
        "load_average": {"before": load_before, "after": load_average()},
        "ceilings": machine_ceilings,
        "model": {
            **workload.MODEL,
            "dtype": "float32",
            "total_parameters": workload.total_parameters(),
            "active_parameters": workload.active_parameters(),
        },
        "repetitions": repetitions,
        "num_output_tokens": NUM_OUTPUT_TOKENS,
        "check": check,
        "transformers_experts": {
            str(size): {"fastest": fastest[size], "trial_s": trials[size]} for size in BATCH_SIZES
        },
        "batches": batches,
        "time_to_first_token": {
            "num_prompt_tokens": len(prompts[0]),
            "median_s": {name: statistics.median(values) for name, values in first_token.items()},
            "seconds": first_token,
        },
    }


def as_contestant(engine: MoEEngine) -> Contestant:
    """Greedy decoding by the engine, past any end-of-sequence token."""

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        return [list(result.outputs[0].token_ids) for result in engine.generate(prompts, params)]

    return generate


def check_tokens(
    reference: Contestant, engines: dict[str, Contestant], prompts: list[list[int]]
) -> dict[str, Any]:
    """Compare all outputs with the reference's; exit if one of them differs."""
    expected = reference(prompts, NUM_OUTPUT_TOKENS)
    num_equal = {}
    for name, generate in engines.items():
        outputs = generate(prompts, NUM_OUTPUT_TOKENS)
        num_equal[name] = sum(a == b for a, b in zip(outputs, expected, strict=True))
    print(f"outputs equal to transformers', of {len(prompts)}: {num_equal}", flush=True)
    if any(number != len(prompts) for number in num_equal.values()):
        sys.exit("not timed: the outputs differ from transformers'")
    return {"num_prompts": len(prompts), "num_equal": num_equal}


def time_alternately(
    contestants: dict[str, Contestant],
    prompts: list[list[int]],
    num_tokens: int,
    repetitions: int,
) -> dict[str, list[float]]:
    """Seconds of each repetition, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for generate in contestants.values():
        generate(prompts, min(num_tokens, 2))
    for _ in range(repetitions):
        for name, generate in contestants.items():
            seconds[name].append(time_call(partial(generate, prompts, num_tokens)))
    return seconds


def summarize(prompts: list[list[int]], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of one batch size, and the rates that the ceilings can be held against.

    ``weight_gb_per_s`` counts the weights that one decoded token needs, once per output token: what
    a batch of 1 reads at least. ``gflops`` counts two operations per active weight and token,
    prompts included.
    """
    num_output = len(prompts) * NUM_OUTPUT_TOKENS
    num_tokens = sum(map(len, prompts)) + num_output
    active = workload.active_parameters()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    summary: dict[str, Any] = {
        "num_requests": len(prompts),
        "num_prompt_tokens": sum(map(len, prompts)),
        "output_tokens_per_s": {name: num_output / s for name, s in medians.items()},
        "gflops": {name: 2 * active * num_tokens / s / 1e9 for name, s in medians.items()},
        "seconds": seconds,
    }
    if len(prompts) == 1:
        num_bytes = FLOAT32_BYTES * active * num_output
        summary["weight_gb_per_s"] = {name: num_bytes / s / 1e9 for name, s in medians.items()}
    return summary


if __name__ == "__main__":
    main()
