"""Steps that compute prompts, alone and beside decodes: as CUDA graphs and launched one by one.

    python -m benchmarks.bench_prompt_steps --config configs/qwen3-30b-a3b-1gpu.yaml --json FILE

For such a step a new request waits until its first token, and whoever decodes waits for it between
two tokens. Timed is a step on an idle device, from the plan to the tokens on the host, as the
engine runs it by default and with every kernel launched by itself; medians. ``host_ms`` is how much
of it the host needs to enqueue the step. Both run the same plan again and again.

Before anything is timed the step's hidden states are compared between the two ways.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_bench import SPARE_STEPS, DecodeBench, add_arguments
from benchmarks.gpu_state import gpu_state, require_gpu
from benchmarks.options import plain_options
from benchmarks.report import save_result
from benchmarks.tune import MAX_ERROR, logits_error
from moe_engine.types.step import StepPlan

NUM_DECODES = (0, 50)
# (prompts, tokens of each).
PROMPTS = ((1, 16), (1, 64), (1, 256), (1, 512), (2, 512), (4, 512), (7, 512))
NUM_INPUT = 512
NUM_REPEATS = 15


def main() -> None:
    """Measure, print and save."""
    arguments = parse_arguments()
    require_gpu()
    most = max(number for number, _ in PROMPTS) + max(NUM_DECODES)
    longest = max(NUM_INPUT, *(tokens for _, tokens in PROMPTS))
    largest = max(NUM_DECODES) + max(number * tokens for number, tokens in PROMPTS)
    options = plain_options(arguments.config, arguments.set)
    options["max_num_batched_tokens"] = max(options.get("max_num_batched_tokens", 0), largest)
    bench = DecodeBench(options, arguments.model, [(most, longest)], SPARE_STEPS)
    rows = []
    print(f"{'decodes':>7s} {'prompts':>8s} {'ms':>7s} {'host ms':>7s}   launched singly")
    for num_decodes in NUM_DECODES:
        for number, num_tokens in PROMPTS:
            row = measure(bench, num_decodes, number, num_tokens)
            rows.append(row)
            way, single = row["engine"], row["launched"]
            print(
                f"{num_decodes:7d} {number:3d}x{num_tokens:<4d} {way['ms']:7.2f} "
                f"{way['host_ms']:7.2f}   {single['ms']:7.2f} {single['host_ms']:7.2f}",
                flush=True,
            )
    if arguments.json:
        output = {
            "gpu": gpu_state(),
            "torch": torch.__version__,
            "model": bench.model,
            "options": options,
            "input": NUM_INPUT,
            "results": rows,
        }
        save_result(arguments.json, output)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def measure(bench: DecodeBench, num_decodes: int, number: int, num_tokens: int) -> dict[str, Any]:
    """Milliseconds of a step of so many prompts beside so many decodes, both ways."""
    plan = bench.repeatable_prompts(num_decodes, NUM_INPUT, number, num_tokens)
    runner = bench.runtime.runner
    graphs = runner._mixed_graphs
    times, states = {}, []
    for name, ways in (("engine", graphs), ("launched", None)):
        runner._mixed_graphs = ways
        states.append(bench.hidden_states(plan))
        times[name] = timed(bench, plan)
    runner._mixed_graphs = graphs
    off = logits_error(*states)
    if not off <= MAX_ERROR:
        raise SystemExit(f"{number}x{num_tokens} beside {num_decodes}: off by {off:.2f}")
    return {"decodes": num_decodes, "prompts": number, "tokens": num_tokens, **times}


def timed(bench: DecodeBench, plan: StepPlan) -> dict[str, float]:
    """Medians of a step on an idle device."""
    whole, host = [], []
    for _ in range(NUM_REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        pending = bench.runtime.runner.launch(plan)
        enqueued = time.perf_counter()
        pending.result()
        whole.append(time.perf_counter() - start)
        host.append(enqueued - start)
    return {"ms": statistics.median(whole) * 1e3, "host_ms": statistics.median(host) * 1e3}


if __name__ == "__main__":
    main()
