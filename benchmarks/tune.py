"""Measures which kernels are best for a model on this GPU and writes the table that ships.

    python -m benchmarks.tune --config configs/qwen3-30b-a3b-1gpu.yaml \\
        --write moe_engine/ops/tuned/h200.json

For every batch size a whole decode step is captured as a CUDA graph, once as the operators choose
today and once for every other kernel that one of them could take (`tune_operators`), and launched
again and again, two steps under way as in the engine. Kernels that are timed alone rank otherwise:
what matters is also whose blocks have room beside those of the kernels before and after. All
variants of a step compute the same tokens at the same positions, drawn at temperature 1; they are
timed in turn, forwards and backwards. A choice stays unless another is faster by more than
`tune_limits.MARGIN`. Attention is also measured for the longer ``--inputs``.

Before a variant is timed its logits are compared with today's, and if they are nothing like them it
is left out, and the status is 1 in the end. That finds a kernel that is wrong altogether; whether
values are right is for the tests.

``--write`` renews the entries of the model's shapes in a file, whose others stay as they are.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_bench import (
    SPARE_STEPS,
    TEMPERATURE,
    DecodeBench,
    Graphs,
    add_arguments,
)
from benchmarks.gpu_state import gpu_state, require_gpu
from benchmarks.gpu_timing import in_turns
from benchmarks.options import int_list, launch_list, launch_name, plain_options
from benchmarks.report import today
from benchmarks.tune_limits import Timed
from benchmarks.tune_operators import DecodeAttention, Operator, operators_of
from moe_engine.ops import tuning
from moe_engine.ops.tuning import Launch
from moe_engine.types.step import StepPlan

BATCHES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256]
INPUTS = [512, 8192]
# Steps of a variant in each of its turns; the first ones of a turn are not timed.
NUM_TURNS, WARM_UP_STEPS, TIMED_STEPS = 2, 3, 16
# Sequences of a batch with longer prompts than the first ``--inputs``.
MAX_LONG_BATCH = 16
# Share of the logits' norm, median over the rows. Near-ties between experts that kernels break
# differently add up over the layers; logits that have nothing to do with each other differ by 1.4.
MAX_ERROR = 0.5
# Columns of a line of the file, without an object's key.
MAX_WIDTH = 88

Measured = dict[str, list[Timed]]
"""Steps by an operator's name."""


def main() -> None:
    """Measure, derive, print and write."""
    arguments = parse_arguments()
    require_gpu()
    started = time.perf_counter()
    device_name = torch.cuda.get_device_name()
    driver = gpu_state()["driver_version"]
    document = read_or_begin(arguments.write, device_name)
    short = arguments.inputs[0]
    cases = [
        (batch, num_input)
        for num_input in arguments.inputs
        for batch in arguments.batches
        if num_input == short or batch <= MAX_LONG_BATCH
    ]
    bench = DecodeBench(
        plain_options(arguments.config, arguments.set),
        arguments.model,
        cases,
        SPARE_STEPS,
        pipeline_depth=2,
    )
    operators = bench_operators(bench, arguments.launches)
    print(f"started in {time.perf_counter() - started:.0f} s", flush=True)
    measured: Measured = defaultdict(list)
    wrong: list[str] = []
    for batch, num_input in cases:
        some = [op for op in operators if num_input == short or isinstance(op, DecodeAttention)]
        for name, timed in measure(bench, some, batch, num_input, wrong).items():
            measured[name].append(timed)
        print(f"  after {time.perf_counter() - started:.0f} s", flush=True)
    if not measured:
        raise SystemExit(f"{device_name} has one kernel for each operator: nothing to choose")
    run = {
        "date": today(),
        "command": command(arguments),
        "torch": torch.__version__,
        "driver": driver,
        "num_layers": bench.num_layers,
        "temperature": TEMPERATURE,
    }
    renew(document, bench.model, run, operators, measured)
    text = to_text(document) + "\n"
    if arguments.write:
        tuning.parse_document(json.loads(text), arguments.write)
        arguments.write.write_text(text)
        print(f"written to {arguments.write}")
    if wrong:
        raise SystemExit(f"left out, because they are wrong: {'; '.join(wrong)}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser, batches=BATCHES)
    parser.add_argument("--inputs", type=int_list, default=INPUTS, help="tokens of a prompt")
    parser.add_argument(
        "--launches",
        type=launch_list,
        default=[],
        help="more of decode attention to try, "
        "warps of a block (0: clusters):most shares:least tokens of a share, ...",
    )
    parser.add_argument("--write", type=Path, help="a file of moe_engine/ops/tuned/")
    return parser.parse_args(argv)


def command(arguments: argparse.Namespace) -> str:
    """What measures the same again."""
    words = ["python", "-m", "benchmarks.tune"]
    for name in ("config", "model"):
        if getattr(arguments, name):
            words += [f"--{name}", str(getattr(arguments, name))]
    words += [word for assignment in arguments.set for word in ("--set", assignment)]
    for name in ("batches", "inputs"):
        words += [f"--{name}", ",".join(map(str, getattr(arguments, name)))]
    if arguments.launches:
        words += ["--launches", ",".join(map(launch_name, arguments.launches))]
    return shlex.join(words)


def bench_operators(bench: DecodeBench, launches: list[Launch]) -> list[Operator]:
    """Those of the bench's model, with more launches of decode attention to try."""
    runtime = bench.runtime
    k_cache_BLGD, _ = runtime.runner._kv.layer(0)
    top_k = runtime.model_config.num_experts_per_tok
    return operators_of(runtime._model, k_cache_BLGD, top_k, launches)


def measure(
    bench: DecodeBench, operators: list[Operator], batch: int, num_input: int, wrong: list[str]
) -> dict[str, Timed]:
    """Steps of one batch with each kernel of each operator that has more than one to take.

    Args:
        wrong: gets a line for every kernel whose logits are.

    Returns:
        The times by the operator's name.
    """
    present = {op.name: op.runs(batch) for op in operators}
    candidates = [
        (op, kernel)
        for op in operators
        for kernel in op.kernels(batch)
        if kernel != present[op.name] and op.takes(kernel, batch)
    ]
    if not candidates:
        return {}
    bench.prepare(batch, num_input, TEMPERATURE)
    plan = bench.repeatable_step()
    graphs = [bench.capture(batch)]
    expected_BV = bench.logits(plan, graphs[0])
    variants = []
    for op, kernel in candidates:
        with op.with_kernel(kernel):
            captured = bench.capture(batch)
        off = logits_error(bench.logits(plan, captured), expected_BV)
        if off <= MAX_ERROR:
            variants.append((op, kernel))
            graphs.append(captured)
        else:
            wrong.append(f"{op.name} by {kernel} at batch {batch}: logits off by {off:.2f}")
    today_ms, *others_ms = step_medians_ms(bench, plan, graphs, NUM_TURNS)
    step_ms = {op.name: {present[op.name]: today_ms} for op, _ in variants}
    for (op, kernel), ms in zip(variants, others_ms, strict=True):
        step_ms[op.name][kernel] = ms
    print(f"batch {batch}, prompts of {num_input} tokens: {today_ms:.3f} ms today")
    for name, times in step_ms.items():
        print(f"  {name}: {', '.join(f'{kernel} {ms:.3f}' for kernel, ms in times.items())}")
    return {name: Timed(batch, num_input, present[name], ms) for name, ms in step_ms.items()}


def step_medians_ms(
    bench: DecodeBench, plan: StepPlan, captured: Sequence[Graphs], num_turns: int
) -> list[float]:
    """Milliseconds of the same step as each of these captured it, the median over all turns."""

    def repeat(graphs: Graphs) -> list[float]:
        return bench.repeat(plan, graphs, WARM_UP_STEPS + TIMED_STEPS)[WARM_UP_STEPS:]

    turns = in_turns([partial(repeat, graphs) for graphs in captured], num_turns)
    return [1e3 * statistics.median(chain.from_iterable(steps)) for steps in turns]


def logits_error(logits_BV: torch.Tensor, expected_BV: torch.Tensor) -> float:
    """By how much of its norm a row is off, the median of the rows."""
    error_B = (logits_BV - expected_BV).norm(dim=1) / expected_BV.norm(dim=1)
    return float(error_B.median())


def read_or_begin(path: Path | None, device_name: str) -> dict[str, Any]:
    """The file to renew, or the beginning of one.

    Raises:
        SystemExit: the file is for another GPU.
    """
    if path is None or not path.exists():
        return {"device": device_name}
    document = tuning.read_document(path)
    tuning.parse_document(document, path)
    if document["device"] != device_name:
        raise SystemExit(f"{path} is for {document['device']}, and this is {device_name}")
    return document


def renew(
    document: dict[str, Any],
    run_name: str,
    run: dict[str, Any],
    operators: list[Operator],
    measured: Measured,
) -> None:
    """Put a run, and an entry for every operator measured in it, into a file's document."""
    document["runs"] = document.get("runs", {}) | {run_name: run}
    for op in operators:
        if op.name not in measured:
            continue
        derived = op.derive(measured[op.name])
        print(f"{op.name}: {op.present}" + (f" -> {derived}" if derived != op.present else ""))
        entry = {
            "shape": dict(zip(op.kind.SHAPE, op.shape, strict=True)),
            "choices": tuning.to_json(derived),
            "measured": {
                "run": run_name,
                "steps": [timed.to_json() for timed in measured[op.name]],
            },
        }
        others = [e for e in document.get(op.section, []) if e["shape"] != entry["shape"]]
        document[op.section] = [*others, entry]


def to_text(value: Any, depth: int = 0) -> str:
    """JSON with a line for what fits one, and else a line for each member.

    Args:
        depth: how many objects and lists the value is in.
    """
    text = json.dumps(value)
    if not isinstance(value, dict | list) or len(text) + 2 * depth <= MAX_WIDTH:
        return text
    indent = "  " * depth
    if isinstance(value, dict):
        members = [f"{json.dumps(name)}: {to_text(v, depth + 1)}" for name, v in value.items()]
    else:
        members = [to_text(member, depth + 1) for member in value]
    inside = ",\n".join(f"{indent}  {member}" for member in members)
    return f"{text[0]}\n{inside}\n{indent}{text[-1]}"


if __name__ == "__main__":
    main()
