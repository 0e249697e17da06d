"""Decode steps, prefill, start and memory of the whole engine, against the bytes it must read.

    python -m benchmarks.bench_engine --config configs/qwen3-30b-a3b-1gpu.yaml \
        --load-format dummy --batches 1,8,32,64,128,256 --input 512 --output 256 --json FILE

Everything goes through `MoEEngine` with token-id prompts, past end-of-sequence tokens, the prefix
cache off. With dummy weights the model needs no checkpoint: a name that is no directory is looked
up in benchmarks/models/. ``--temperature 1`` draws nearly uniform tokens from dummy weights, and a
batch then needs as many experts as the floor assumes; greedy, the default, sequences may come to
repeat the same token and need fewer, as the share of distinct tokens in the results shows.

- A decode step's time is the mean interval between the last ``output / 2`` tokens that all prompts
  of a run decode together, the median over the repetitions. Percentiles of the same intervals stand
  beside it.
- Prefill is the slope between prompts for 1 and for 8 steps of ``--prefill-tokens`` tokens, medians
  of 5 and 3 repetitions at least (more if ``--repetitions`` is more), as the peers' is (`peer`). A
  median of two would be their mean, and one hiccup in the fewer steps would flatten the slope.
- The start is the time that ``MoEEngine(...)`` takes; what this process had imported before stands
  beside it as ``imports_s``, and whether Triton's cache was empty, so that kernels had to be
  compiled, as ``triton_cache``.
- The floor is the time to read once what a step must read (`decode_floor`), at the rate of
  reading that this machine showed just before (`ceilings`).
- After the run, what the memory ledger sums up to is held against what the driver says is used.
- ``--check`` decodes the same prompts alone, in one batch, and beside others, and counts outputs
  that are the same token by token. Kernels that add in another order for another batch may
  break near-ties of random weights differently; the count says how often.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import ceilings
from benchmarks.clock import process_start
from benchmarks.decode_floor import slope, step_bytes
from benchmarks.driver import Run, percentile, random_prompts, run_batch
from benchmarks.gpu_state import gpu_state, require_gpu, triton_cache
from benchmarks.options import MODELS, find_model, int_list, plain_options
from benchmarks.peer import read_peer
from benchmarks.report import print_decode, print_prefill, save_result
from moe_engine import MoEEngine
from moe_engine.checkpoint.skew import zipf_popularity
from moe_engine.config import ModelConfig
from moe_engine.config.engine import GIB
from moe_engine.types.messages import MemoryLedger

# Steps' worth of prompts -> repetitions, at least.
PREFILL_STEPS = {1: 5, 8: 3}
CHECKED_PROMPTS, CHECKED_TOKENS = 8, 32


def main() -> None:
    """Measure, print and save."""
    imports_s = time.perf_counter() - process_start()
    arguments = parse_arguments()
    options = engine_options(arguments)
    peers = [read_peer(path) for path in arguments.peer]
    for peer in peers:
        peer.check_temperature(arguments.temperature)
    device = "cpu" if options["device"] == "cpu" else "cuda"
    if device == "cuda":
        require_gpu()
    result: dict[str, Any] = {
        "options": options,
        "workload": {
            name: getattr(arguments, name)
            for name in ("input", "output", "temperature", "repetitions")
        },
        "imports_s": imports_s,
        "ceilings": ceilings.run(device),
    }
    if device == "cuda":
        result["gpu_before"] = gpu_state()
        result["triton_cache"] = triton_cache()
    started = time.perf_counter()
    with MoEEngine(**options) as engine:
        result["start_s"] = time.perf_counter() - started
        # By name: as a message, the ledger is an array.
        memory = msgspec.structs.asdict(engine.info.memory)
        result["engine"] = msgspec.structs.asdict(engine.info) | {"memory": memory}
        print(engine.info.summary, flush=True)
        bench = EngineBench(engine, options, result["ceilings"], arguments)
        if arguments.check:
            result["check"] = bench.check()
        result["decode"] = [bench.decode(batch) for batch in arguments.batches]
        print_decode(result["decode"], peers)
        if arguments.prefill_tokens:
            result["prefill"] = bench.prefill(arguments.prefill_tokens)
            print_prefill(result["prefill"], peers)
        if device == "cuda":
            result["gpu_after"] = gpu_state()
            result["memory"] = planned_and_used(engine.info.memory, result["gpu_after"])
            print(describe_memory(result["memory"]))
    result["peers"] = [peer.to_json() for peer in peers]
    if arguments.json:
        save_result(arguments.json, result, leave_out=f"{MODELS}/")  # not where this checkout is


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, help="YAML file of the engine's options")
    parser.add_argument("--model", help="checkpoint directory, or a name in benchmarks/models")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="dummy")
    parser.add_argument("--skew", type=float, default=0.0, help="Zipf exponent of dummy routing")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--batches", type=int_list, default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--input", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=256, help="tokens of a run, less 1")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="of a step; 0 leaves out")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--peer", type=Path, action="append", default=[], help="a file that benchmarks.peer wrote"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `MoEEngine`: the YAML file's, then what the benchmark needs."""
    values = plain_options(arguments.config, [])
    longest = max(arguments.input + arguments.output + 1, arguments.prefill_tokens + 1)
    most = max([*arguments.batches, 2 * CHECKED_PROMPTS])
    if arguments.prefill_tokens:
        most = max(most, max(PREFILL_STEPS) * arguments.prefill_tokens // arguments.input)
        values["max_num_batched_tokens"] = arguments.prefill_tokens
    values |= {
        "device": values.get("device", "auto"),
        "load_format": arguments.load_format,
        "dummy_expert_skew": arguments.skew,
        "skip_tokenizer_init": True,
        "prefix_cache": False,
        "max_model_len": longest,
        "max_num_seqs": most,
        "max_num_batched_tokens": max(values.get("max_num_batched_tokens", 0), most),
    }
    values |= plain_options(None, arguments.set)
    values["model"] = find_model(arguments.model or values.get("model"))
    return values


def planned_and_used(ledger: MemoryLedger, gpu: dict[str, Any]) -> dict[str, float]:
    """What the ledger sums up to against what the driver says is used, in bytes, after a run.

    The difference is in percent of the plan. The driver counts what all processes use.

    Args:
        gpu: as `gpu_state` gives it.
    """
    parts = (ledger.at_start, ledger.weights, ledger.activations, ledger.graphs, ledger.kv_cache)
    planned, used = sum(parts), int(gpu["memory.used"]) << 20
    return {
        "planned": planned,
        "used": used,
        "difference_percent": 100 * (used - planned) / planned,
    }


def describe_memory(memory: dict[str, float]) -> str:
    """One line, from `planned_and_used`."""
    return (
        f"memory: planned {memory['planned'] / GIB:.2f} GiB, used {memory['used'] / GIB:.2f} GiB "
        f"({memory['difference_percent']:+.2f}%)"
    )


class EngineBench:
    """The measurements that need a running engine."""

    def __init__(
        self,
        engine: MoEEngine,
        options: dict[str, Any],
        machine: dict[str, Any],
        arguments: argparse.Namespace,
    ) -> None:
        self._engine = engine
        self._arguments = arguments
        self._bandwidth = ceilings.rate(machine, "read")
        self._model: ModelConfig = engine._front_end.model_config
        num_experts, top_k = self._model.num_experts, self._model.num_experts_per_tok
        skew = options["dummy_expert_skew"]
        even = [top_k / num_experts] * num_experts
        self._popularity = zipf_popularity(num_experts, top_k, skew) if skew else even
        is_float32 = options.get("dtype", "auto") == "float32" or options["device"] == "cpu"
        self._item_size = 4 if is_float32 else 2
        self._seed = 0

    def decode(self, batch: int) -> dict[str, Any]:
        """One batch size: step time, rates, floor."""
        num_input, num_output = self._arguments.input, self._arguments.output
        num_steps = num_output // 2
        self._timed(batch, num_input, min(9, num_steps))  # warm up
        runs = [
            self._timed(batch, num_input, num_output + 1)
            for _ in range(self._arguments.repetitions)
        ]
        steady = [run.step_seconds()[-num_steps:] for run in runs]
        assert all(len(steps) == num_steps for steps in steady), "too few steps of the whole batch"
        step_s = statistics.median(map(statistics.mean, steady))
        intervals = [seconds for steps in steady for seconds in steps]
        context = num_input + num_output + 1 - num_steps / 2
        needed = step_bytes(self._model, batch, context, self._popularity, self._item_size)
        floor_s = needed.total / self._bandwidth
        return {
            "batch": batch,
            "step_ms": step_s * 1e3,
            "interval_ms": {
                name: percentile(intervals, share) * 1e3
                for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
            },
            "tok_per_s": batch / step_s,
            "distinct_tokens": statistics.mean(run.share_of_distinct_tokens() for run in runs),
            "mean_context": context,
            "bytes": {"experts": needed.experts, "dense": needed.dense, "kv": needed.kv},
            "floor_ms": floor_s * 1e3,
            "share_of_bandwidth": floor_s / step_s,
            "seconds": [run.seconds for run in runs],
        }

    def prefill(self, tokens_per_step: int) -> list[dict[str, Any]]:
        """Prompt tokens per second at two shapes of a full step."""
        results = []
        for length in (self._arguments.input, tokens_per_step):
            per_step = tokens_per_step // length
            for _ in range(2):  # warm up
                self._timed(per_step, length, 1)
            seconds = {
                steps: [
                    self._timed(per_step * steps, length, 1).seconds
                    for _ in range(max(at_least, self._arguments.repetitions))
                ]
                for steps, at_least in PREFILL_STEPS.items()
            }
            step_s = slope(*((n, statistics.median(s)) for n, s in seconds.items()))
            results.append(
                {
                    "shape": f"{per_step}x{length}",
                    "step_ms": step_s * 1e3,
                    "tok_per_s": per_step * length / step_s,
                    "seconds": {str(n): s for n, s in seconds.items()},
                }
            )
        return results

    def check(self) -> dict[str, Any]:
        """Whether prompts decode to the same tokens alone, together, and beside others."""
        vocab_size = self._model.vocab_size
        prompts = random_prompts(CHECKED_PROMPTS, self._arguments.input, vocab_size, seed=-1)
        others = random_prompts(CHECKED_PROMPTS, self._arguments.input // 2, vocab_size, seed=-2)
        alone = [
            run_batch(self._engine, [prompt], CHECKED_TOKENS).token_ids[0] for prompt in prompts
        ]
        together = run_batch(self._engine, prompts, CHECKED_TOKENS).token_ids
        mixed = run_batch(self._engine, [*others, *prompts], CHECKED_TOKENS).token_ids
        result = {
            "num_prompts": len(prompts),
            "num_tokens": CHECKED_TOKENS,
            "num_equal_together": sum(map(tuple.__eq__, alone, together)),
            "num_equal_mixed": sum(map(tuple.__eq__, alone, mixed[len(others) :])),
        }
        print(f"outputs equal to those of a prompt alone: {result}", flush=True)
        return result

    def _timed(self, batch: int, num_input: int, num_output: int) -> Run:
        """A run with prompts never seen before."""
        self._seed += 1
        prompts = random_prompts(batch, num_input, self._model.vocab_size, self._seed)
        return run_batch(self._engine, prompts, num_output, self._arguments.temperature)


if __name__ == "__main__":
    main()
