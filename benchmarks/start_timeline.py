"""Phase by phase and kernel by kernel, where the time of a start on a GPU goes.

    python -m benchmarks.start_timeline --config configs/qwen3-30b-a3b-1gpu.yaml

The rank runs in this process, with dummy weights and an empty Triton cache, as on a machine that
has never run the engine; ``--warm DIRECTORY`` uses one that stays. For every kernel it prints how
many variants were compiled, ahead and when they were launched, and the processor seconds of their
stages. ``ast`` is mostly Python and holds its lock; the rest runs side by side. Seconds of threads
that wait for that lock count too.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.clock import process_start
from benchmarks.gpu_state import require_gpu
from benchmarks.options import find_model, plain_options
from benchmarks.report import save_result
from moe_engine.config.flat import build_config
from moe_engine.dist.layout import RankLayout
from moe_engine.dist.rendezvous import open_store
from moe_engine.engine.model_directory import resolve_model
from moe_engine.engine.runtime import LocalPlace, RankRuntime
from moe_engine.engine.startup import StartupClock, describe_startup


class CompileLog:
    """Listens to Triton's compiler."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.variants: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def compiled(self, *, src: Any, times: Any, cache_hit: bool, **others: Any) -> None:
        """Triton's `knobs.compilation.listener`."""
        stages = self.seconds[src.fn.fn.__name__]
        stages["hits" if cache_hit else "ast"] += times.ir_initialization / 1e6
        for stage, microseconds in times.lowering_stages:
            stages[stage] += microseconds / 1e6

    def entered(self, *, fn: Any, is_manual_warmup: bool, **others: Any) -> None:
        """Triton's `knobs.runtime.jit_post_compile_hook`."""
        name = fn.name.rpartition(".")[2]
        self.variants[name]["ahead" if is_manual_warmup else "launched"] += 1

    def table(self) -> str:
        """Kernels, the most expensive first."""
        lines = [f"{'kernel':28}{'ahead':>6}{'launched':>9}{'seconds':>9}"]
        total = {name: sum(stages.values()) for name, stages in self.seconds.items()}
        for name in sorted(total, key=lambda name: -total[name]):
            stages = " ".join(f"{stage} {s:.2f}" for stage, s in self.seconds[name].items())
            counts = self.variants[name]
            row = f"{name:28}{counts['ahead']:6}{counts['launched']:9}{total[name]:9.2f}"
            lines.append(f"{row}  {stages}")
        ahead, launched = (
            sum(variants[how] for variants in self.variants.values())
            for how in ("ahead", "launched")
        )
        return "\n".join([*lines, f"{'all':28}{ahead:6}{launched:9}{sum(total.values()):9.2f}"])


class CollectorClock:
    """Adds up what Python's cycle collector takes."""

    def __init__(self) -> None:
        self.seconds, self.num_full, self._start = 0.0, 0, 0.0
        gc.callbacks.append(self._hear)

    def _hear(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._start = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self._start
            self.num_full += info["generation"] == 2


def main() -> None:
    """Start once, and print."""
    arguments = parse_arguments()
    require_gpu()
    import triton

    collector, log = CollectorClock(), CompileLog()
    triton.knobs.compilation.listener = log.compiled
    triton.knobs.runtime.jit_post_compile_hook = log.entered
    options = plain_options(arguments.config, arguments.set)
    options["model"] = str(resolve_model(find_model(arguments.model or options.get("model"))))
    config, _ = build_config(options | {"load_format": "dummy"})
    with tempfile.TemporaryDirectory() as directory:
        triton.knobs.cache.dir = str(arguments.warm or Path(directory) / "triton")
        clock = StartupClock(process_start())
        clock.mark("imports")
        runtime = RankRuntime(config, RankLayout(0, 1, 1), LocalPlace(0, 1), clock)
        runtime.join(open_store(f"{directory}/store", 0, 1))
        runtime.start(runtime.load(lambda *_: None))
    print(log.table())
    print(f"cycle collector: {collector.seconds:.2f} s, {collector.num_full} full collections")
    print(f"start: {describe_startup(clock.seconds)}")
    if arguments.json:
        seconds = {name: dict(stages) for name, stages in log.seconds.items()}
        variants = {name: dict(counts) for name, counts in log.variants.items()}
        result = {"startup_s": clock.seconds, "kernel_s": seconds, "variants": variants}
        save_result(arguments.json, result)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, help="YAML file of the engine's options")
    parser.add_argument("--model", help="checkpoint directory, or a name in benchmarks/models")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--warm", type=Path, metavar="DIRECTORY", help="Triton's cache to use")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
