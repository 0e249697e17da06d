"""Kernel by kernel, where the time of a decode step goes.

    python -m benchmarks.step_timeline --config configs/qwen3-30b-a3b-1gpu.yaml \
        --batches 1,8,64 --input 512 --json benchmarks/results/step_timeline.json

The rank runs in this process, with dummy weights: prompts are computed, some steps decode to warm
up, then single steps are recorded with torch's profiler, each with the device idle before and
after it. The step whose span is the median is kept. For every kernel the JSON has its name, start
and duration in microseconds; sums by name are also given per layer. The profiler makes the gaps
between kernels wider and their durations hardly longer: the sum of durations is to be trusted,
the span less so.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_engine import find_model, int_list, plain_options
from benchmarks.driver import random_prompts
from moe_engine.config.flat import build_config
from moe_engine.dist.layout import RankLayout
from moe_engine.dist.rendezvous import open_store
from moe_engine.engine.model_directory import resolve_model
from moe_engine.engine.runtime import LocalPlace, RankRuntime
from moe_engine.engine.scheduler import Scheduler
from moe_engine.types.messages import AddRequest
from moe_engine.types.sampling import SamplingParams

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
    bench = DecodeBench(arguments)
    results = []
    for batch in arguments.batches:
        step = bench.prepare(batch, arguments.input)
        for _ in range(WARM_UP_STEPS):
            step()
        kernels = median_step([record(step) for _ in range(RECORDED_STEPS)])
        results.append(summarize(batch, kernels, bench.num_layers))
        print_summary(results[-1])
    output = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": bench.model,
        "num_layers": bench.num_layers,
        "input": arguments.input,
        "steps": results,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(output) + "\n")
        print(f"written to {arguments.json}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, help="YAML file of the engine's options")
    parser.add_argument("--model", help="checkpoint directory, or a name in benchmarks/models")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--batches", type=int_list, default=[1, 8, 64])
    parser.add_argument("--input", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


class DecodeBench:
    """A rank of one in this process, and a scheduler to plan its steps."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        options = plain_options(arguments.config, arguments.set)
        # The first sequences decode while others, one a step at worst, compute their prompts.
        longest = arguments.input + WARM_UP_STEPS + RECORDED_STEPS + 8 + max(arguments.batches)
        model = str(resolve_model(find_model(arguments.model or options.get("model"))))
        options |= {
            "model": model,
            "load_format": "dummy",
            "prefix_cache": False,
            "pipeline_depth": 1,
            "max_model_len": longest,
            "max_num_seqs": max(arguments.batches),
            "num_blocks": max(arguments.batches) * (-(-longest // 16) + 1),
            "block_size": 16,
        }
        self._config, _ = build_config(options)
        runtime = RankRuntime(self._config, RankLayout(0, 1, 1), LocalPlace(0, 1))
        with tempfile.TemporaryDirectory() as directory:
            runtime.join(open_store(f"{directory}/store", 0, 1))
        self._num_blocks = runtime.load(lambda *_: None)
        runtime.start(self._num_blocks)
        self._runtime = runtime
        self.model = Path(model).name
        self.num_layers = runtime.model_config.num_hidden_layers
        self._scheduler = Scheduler(
            self._config.scheduler,
            self._config.cache,
            num_groups=1,
            num_blocks=self._num_blocks,
            max_model_len=runtime.max_model_len,
            eos_token_ids=(),
            seed=0,
        )
        self._ids: list[str] = []

    def prepare(self, batch: int, num_input: int) -> Callable[[], None]:
        """Compute the prompts of a new batch; the function returned runs one decode step of it."""
        for request_id in self._ids:
            self._scheduler.abort(request_id)
        vocab_size = self._runtime.model_config.vocab_size
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        self._ids = [f"{batch}-{number}" for number in range(batch)]
        prompts = random_prompts(batch, num_input, vocab_size, seed=batch)
        for request_id, prompt in zip(self._ids, prompts, strict=True):
            self._scheduler.add(AddRequest(request_id, prompt, params))
        is_prefilling = True
        while is_prefilling:
            is_prefilling = self._step() != batch
        return lambda: assert_equal(self._step(), batch)

    def _step(self) -> int:
        """Run a step; returns how many sequences decoded in it, 0 if any computed its prompt."""
        plan = self._scheduler.schedule()
        assert plan is not None
        result = self._runtime.runner.launch(plan).result()
        assert result is not None
        self._scheduler.complete([result])
        steps = plan.groups[0].steps
        return len(steps) if all(step.num_tokens == 1 for step in steps) else 0


def assert_equal(value: int, expected: int) -> None:
    """A step that was not what it should be makes the figures worthless."""
    assert value == expected, (value, expected)


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


def summarize(batch: int, kernels: list[Kernel], num_layers: int) -> dict[str, Any]:
    """Totals, sums by kernel with the longest first, and the kernels themselves."""
    groups: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        groups[short_name(kernel.name)].append(kernel.duration_us)
    return {
        "batch": batch,
        "span_us": span_us(kernels),
        "busy_us": sum(kernel.duration_us for kernel in kernels),
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
    head, bracket, template = name.removeprefix("void ").partition("<")
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
