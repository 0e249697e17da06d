"""Kernel by kernel, where the time of a decode step goes.

    python -m benchmarks.step_timeline --config configs/qwen3-30b-a3b-1gpu.yaml \
        --batches 1,8,64 --input 512 --json benchmarks/results/step_timeline.json

The rank runs in this process (`decode_bench`): prompts are computed, some steps decode to warm
up, then single steps are recorded with torch's profiler, each with the device idle before and
after it. Tokens are drawn at temperature 1. The step whose span is the median is kept. For every
kernel the JSON has its name, start and duration in microseconds; sums by name are also given per
layer. A kernel may start long before the one before it ends, and waits: so what is summed up is the
time from when all before it have ended to its own end. The profiler makes the gaps between kernels
wider and those times hardly longer: their sum is to be trusted, the span less so.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.decode_bench import TEMPERATURE, DecodeBench, add_arguments
from benchmarks.gpu_state import require_gpu
from benchmarks.options import plain_options
from benchmarks.report import save_result

WARM_UP_STEPS, RECORDED_STEPS = 8, 5
SHORT_NAME_LENGTH = 60


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the device; microseconds since the step's first one."""

    name: str
    start_us: float
    duration_us: float


def main() -> None:
    """Record, print and save."""
    arguments = parse_arguments()
    require_gpu()
    bench = DecodeBench(
        plain_options(arguments.config, arguments.set),
        arguments.model,
        [(batch, arguments.input) for batch in arguments.batches],
        WARM_UP_STEPS + RECORDED_STEPS,
    )
    results = []
    for batch in arguments.batches:
        step = bench.prepare(batch, arguments.input, TEMPERATURE)
        for _ in range(WARM_UP_STEPS):
            step()
        kernels = median_step([record(step) for _ in range(RECORDED_STEPS)])
        results.append(summarize(batch, kernels, bench.num_layers))
        print_summary(results[-1])
    output = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": bench.model,
        "num_layers": bench.num_layers,
        "input": arguments.input,
        "temperature": TEMPERATURE,
        "steps": results,
    }
    if arguments.json:
        save_result(arguments.json, output, indent=None)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser, batches=[1, 8, 64])
    parser.add_argument("--input", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def record(step: Callable[[], None]) -> list[Kernel]:
    """The kernels of one call, in the order of their starts."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return device_kernels(profiler.events())


def device_kernels(events: Any) -> list[Kernel]:
    """What ran on the device, from the profiler's events."""
    cuda = torch.autograd.DeviceType.CUDA
    found = sorted(
        (event.time_range.start, event.time_range.end - event.time_range.start, event.name)
        for event in events
        if event.device_type == cuda and event.time_range.end > event.time_range.start
    )
    first = found[0][0] if found else 0.0
    return [Kernel(name, start - first, duration) for start, duration, name in found]


def median_step(steps: list[list[Kernel]]) -> list[Kernel]:
    """The step of median span."""
    return sorted(steps, key=span_us)[len(steps) // 2]


def span_us(kernels: list[Kernel]) -> float:
    """From the start of the first kernel to the end of the last."""
    return max((kernel.start_us + kernel.duration_us for kernel in kernels), default=0.0)


def own_us(kernels: list[Kernel]) -> list[float]:
    """By how long each kernel, in the order of their starts, outlasts all before it, less gaps.

    Example: 0 to 4, 1 to 6 and 8 to 9 are 4, 2 and 1.
    """
    own, latest = [], 0.0
    for kernel in kernels:
        end = kernel.start_us + kernel.duration_us
        own.append(max(0.0, end - max(kernel.start_us, latest)))
        latest = max(latest, end)
    return own


def summarize(batch: int, kernels: list[Kernel], num_layers: int) -> dict[str, Any]:
    """Totals, sums of `own_us` by kernel with the longest first, and the kernels themselves."""
    own = own_us(kernels)
    groups: dict[str, list[float]] = defaultdict(list)
    for kernel, duration in zip(kernels, own, strict=True):
        groups[short_name(kernel.name)].append(duration)
    return {
        "batch": batch,
        "span_us": span_us(kernels),
        "busy_us": sum(own),
        "num_kernels": len(kernels),
        "by_kernel": [
            {
                "name": name,
                "count": len(durations),
                "sum_us": sum(durations),
                "per_layer_us": sum(durations) / num_layers,
            }
            for name, durations in sorted(groups.items(), key=lambda item: -sum(item[1]))
        ],
        "kernels": [asdict(kernel) for kernel in kernels],
    }


def short_name(name: str) -> str:
    """A kernel's name without return type, arguments and namespaces; template arguments cut.

    Example: ``void at::native::reduce_kernel<512, 1>(int)`` is ``reduce_kernel<512, 1>``.
    """
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    head, bracket, template = name.partition("<")
    head = head.partition("(")[0].rpartition("::")[2]
    inside = re.sub(r"\w+::", "", template.rpartition(">")[0]) if bracket else ""
    short = f"{head}<{inside}>" if bracket else head
    return short if len(short) <= SHORT_NAME_LENGTH else f"{short[: SHORT_NAME_LENGTH - 1]}…"


def print_summary(result: dict[str, Any]) -> None:
    """The kernels that matter, one a line."""
    print(
        f"\nbatch {result['batch']}: {result['num_kernels']} kernels, busy "
        f"{result['busy_us']:.0f} us of {result['span_us']:.0f} us"
    )
    for row in result["by_kernel"][:16]:
        print(
            f"  {row['sum_us']:9.1f} us {row['per_layer_us']:7.2f} a layer  x{row['count']:<5} "
            f"{row['name']}"
        )


if __name__ == "__main__":
    main()
