"""Builds of the CUDA extension against each other, in whole steps.

    python -m benchmarks.compare_builds old/_C.so new/_C.so \\
        --config configs/qwen3-30b-a3b-1gpu.yaml --batches 8,64,256 --prompts 1x8192,16x512

A kernel that is faster by itself may hold up its neighbours, so builds are compared by what users
wait for. All builds run in one process: a decode step is captured once with each of them, and all
compute the same tokens at the same positions, which need the same experts; prompts are computed
from the first to the last token. They take turns (`gpu_timing.in_turns`). Differences below half a
percent are noise.

Before a batch is timed each build's logits are compared with the first one's, and a build whose
logits are nothing like them ends the benchmark.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.decode_bench import SPARE_STEPS, TEMPERATURE, DecodeBench, add_arguments
from benchmarks.gpu_state import require_gpu
from benchmarks.gpu_timing import in_turns
from benchmarks.options import plain_options
from benchmarks.report import save_result
from benchmarks.tune import MAX_ERROR, logits_error, step_medians_ms
from moe_engine.ops import hopper

NUM_TURNS = 4
PROMPT_TURNS = 8


def main() -> None:
    """Compare, print and save."""
    arguments = parse_arguments()
    require_gpu()
    builds = {str(path): load_build(path) for path in arguments.builds}
    decodes = [(batch, arguments.input) for batch in arguments.batches]
    options = plain_options(arguments.config, arguments.set)
    if arguments.prompts:
        options["max_num_batched_tokens"] = max(n * length for n, length in arguments.prompts)
    bench = DecodeBench(
        options, arguments.model, [*decodes, *arguments.prompts], SPARE_STEPS, pipeline_depth=2
    )
    results = [decode(bench, builds, *case) for case in decodes]
    results += [prompts(bench, builds, *case) for case in arguments.prompts]
    if arguments.json:
        output = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "model": bench.model,
            "results": results,
        }
        save_result(arguments.json, output)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("builds", type=Path, nargs="+", help="files of the extension")
    add_arguments(parser, batches=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--input", type=int, default=640, help="tokens of a decode step's prompts")
    parser.add_argument("--prompts", type=_shapes, default=[], help="NUMBERxTOKENS,...")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def _shapes(text: str) -> list[tuple[int, int]]:
    """``1x8192,16x512`` as [(1, 8192), (16, 512)]."""
    pairs = (part.split("x") for part in text.split(","))
    return [(int(number), int(length)) for number, length in pairs]


def load_build(path: Path) -> ModuleType:
    """A module of its own for every path.

    pybind11 keeps the first module of a name, so each gets another one; Python looks for the
    function that makes it by the last part of the name.
    """
    name = f"build_{path.resolve()}".replace("/", "_").replace(".", "_") + "._C"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextmanager
def running(build: ModuleType) -> Iterator[None]:
    """Operators launch this build's kernels inside; what is captured there keeps them."""
    present = hopper.extension
    hopper.extension = lambda device: build  # type: ignore[assignment]
    try:
        yield
    finally:
        hopper.extension = present


def decode(
    bench: DecodeBench, builds: dict[str, ModuleType], batch: int, num_input: int
) -> dict[str, Any]:
    """Milliseconds of the same decode step by each build."""
    bench.prepare(batch, num_input, TEMPERATURE)
    plan = bench.repeatable_step()
    graphs, logits = [], []
    for name, build in builds.items():
        with running(build):
            graphs.append(bench.capture(batch))
            logits.append(bench.logits(plan, graphs[-1]))
        error = logits_error(logits[-1], logits[0])
        if error > MAX_ERROR:
            raise SystemExit(f"{name} is wrong at batch {batch}: logits off by {error:.2f}")
    return report(
        f"batch {batch}, prompts of {num_input}",
        builds,
        step_medians_ms(bench, plan, graphs, NUM_TURNS),
    )


def prompts(
    bench: DecodeBench, builds: dict[str, ModuleType], number: int, length: int
) -> dict[str, Any]:
    """Milliseconds until each build has computed the same prompts and drawn their first tokens."""

    runner = bench.runtime.runner

    def compute(build: ModuleType) -> Callable[[], float]:
        with running(build):
            runner.capture_mixed_graphs()  # a graph holds the kernels of the build that captured it
        graphs = runner._mixed_graphs

        def timed() -> float:
            runner._mixed_graphs = graphs
            with running(build):
                torch.cuda.synchronize()
                start = time.perf_counter()
                bench.prepare(number, length, TEMPERATURE)
                torch.cuda.synchronize()
                return time.perf_counter() - start

        return timed

    calls = [compute(build) for build in builds.values()]
    for call in calls:
        call()  # warm up
    turns = in_turns(calls, PROMPT_TURNS)
    medians_ms = [1e3 * statistics.median(seconds) for seconds in turns]
    return report(f"prompts {number}x{length}", builds, medians_ms)


def report(case: str, builds: dict[str, ModuleType], medians_ms: Sequence[float]) -> dict[str, Any]:
    """Print them, with the difference from the first; returns them for the JSON."""
    by_build = dict(zip(builds, medians_ms, strict=True))
    for name, ms in by_build.items():
        print(f"{case}: {ms:8.3f} ms {ms / medians_ms[0] - 1:+7.2%}  {name}", flush=True)
    return {"case": case, "ms": by_build}


if __name__ == "__main__":
    main()
