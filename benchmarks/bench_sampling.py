"""Sampling on one GPU: the kernels against a float64 distribution, then their time per step.

    python -m benchmarks.bench_sampling --json FILE

Logits are bfloat16 rows of Qwen3's vocabulary. Spread 3 is like a language model's: a few dozen
tokens carry the distribution; spread 0.5 leaves top_p with most of the vocabulary. Every case is
checked first: a token's part of the cumulative distribution must hold the row's uniform number.
Each logit must be read once at least; those bytes over the time are set against the rate of reading
of the same run (`benchmarks.ceilings`). One row's logits may stay in the L2 cache in parts.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings
from benchmarks.gpu_state import require_gpu
from benchmarks.gpu_timing import eager_seconds, num_rotations, seconds_per_call
from benchmarks.machine import describe_machine
from benchmarks.report import save_result
from benchmarks.small_kernels import VOCAB_SIZE, against_reading
from moe_engine.ops.reference import sampling as reference
from moe_engine.ops.sampling import any_filter, greedy_tokens, sample_tokens

DEVICE = "cuda"
BATCHES = (1, 64, 256)
TOLERANCE = 1e-5
MAX_CHECKS = 32
# Temperature, top_k, top_p, min_p.
SETTINGS: dict[str, tuple[float, float, float, float]] = {
    "greedy rows": (0.0, 0, 1.0, 0.0),
    "temperature 1": (1.0, 0, 1.0, 0.0),
    "Qwen3": (0.6, 20, 0.95, 0.0),
    "top_p 0.95": (1.0, 0, 0.95, 0.0),
    "top_k 1000": (1.0, 1000, 1.0, 0.0),
    "min_p 0.05": (1.0, 0, 1.0, 0.05),
}
SPREADS = (3.0, 0.5)


def main() -> None:
    """Check, measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    arguments = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    start = time.perf_counter()
    machine_ceilings = ceilings.run("cuda")
    print(ceilings.describe(machine_ceilings))
    reading = ceilings.rate(machine_ceilings, "read")
    rows: list[dict[str, Any]] = []
    for num_rows in BATCHES:
        for spread in SPREADS:
            logits = make_logits(num_rows, spread)
            for name in [*SETTINGS, "mixed"]:
                rows.append(measure(name, spread, logits, reading))
                print(describe(rows[-1]), flush=True)
            rows.append(measure_argmax(spread, logits, reading))
            print(describe(rows[-1]), flush=True)
    result = {
        "machine": describe_machine() | {"gpu": torch.cuda.get_device_name()},
        "ceilings": machine_ceilings,
        "rows": rows,
        "seconds": time.perf_counter() - start,
    }
    print(f"{result['seconds']:.0f} s in all")
    save_result(arguments.json, result)


def make_logits(num_rows: int, spread: float) -> list[torch.Tensor]:
    """Enough batches of logits to leave the L2 cache behind."""
    num = num_rotations(2 * num_rows * VOCAB_SIZE)
    shape = (num_rows, VOCAB_SIZE)
    return [(torch.randn(shape, device=DEVICE) * spread).bfloat16() for _ in range(num)]


def make_params(name: str, num_rows: int) -> torch.Tensor:
    """float64 [5, B] on the host; "mixed" takes the settings in turn."""
    settings = list(SETTINGS.values()) if name == "mixed" else [SETTINGS[name]]
    chosen = torch.tensor([settings[row % len(settings)] for row in range(num_rows)])
    return torch.cat([chosen.double().T, torch.rand(1, num_rows, dtype=torch.float64)]).contiguous()


def measure(name: str, spread: float, logits: list[torch.Tensor], reading: float) -> dict[str, Any]:
    """Check and time one kind of rows.

    Args:
        reading: the machine's bytes/s.
    """
    num_rows = len(logits[0])
    params_5B = make_params(name, num_rows)
    on_device = params_5B.to(DEVICE)
    sample = partial(sample_tokens, may_filter=any_filter(params_5B.numpy(), VOCAB_SIZE))
    check(logits[0], params_5B, sample(logits[0], on_device))
    seconds = seconds_per_call([partial(sample, one, on_device) for one in logits])
    row = {
        "case": name,
        "rows": num_rows,
        "spread": spread,
        **against_reading(seconds * 1e6, logits[0].nbytes, reading),
        "launch_us": launch_seconds(partial(sample, logits[0], on_device)) * 1e6,
    }
    if name == "Qwen3" and num_rows == 64:
        plain = partial(reference.sample_tokens, logits[0], params_5B)
        row["pytorch_us"] = eager_seconds(plain, 3) * 1e6
    return row


def measure_argmax(spread: float, logits: list[torch.Tensor], reading: float) -> dict[str, Any]:
    """The kernel that a batch of greedy rows alone takes, to compare with."""
    num_rows = len(logits[0])
    check(logits[0], make_params("greedy rows", num_rows), greedy_tokens(logits[0]))
    seconds = seconds_per_call([partial(greedy_tokens, one) for one in logits])
    timed = against_reading(seconds * 1e6, logits[0].nbytes, reading)
    return {"case": "argmax", "rows": num_rows, "spread": spread, **timed}


def launch_seconds(call: partial[torch.Tensor], repetitions: int = 20) -> float:
    """What one call that is not captured takes of the host's time."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repetitions):
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / repetitions


def check(logits_BV: torch.Tensor, params_5B: torch.Tensor, tokens_B: torch.Tensor) -> None:
    """Fail unless every token's interval of the distribution holds the row's uniform number."""
    tokens = tokens_B.tolist()
    for row in range(0, len(tokens), max(1, len(tokens) // MAX_CHECKS)):
        token = tokens[row]
        temperature, top_k, top_p, min_p, uniform = params_5B[:, row].tolist()
        logits_1V = logits_BV[row : row + 1].float()
        if temperature == 0.0:
            is_best = logits_1V[0, token] == logits_1V.amax()
            assert is_best, f"row {row}: {token} is not the most likely"
            continue

        def one(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor([value], dtype=dtype, device=logits_BV.device)

        logits_1V = reference.scale_by_temperature(logits_1V, one(temperature))
        logits_1V = reference.mask_min_p(logits_1V, one(min_p))
        if top_k:
            logits_1V = reference.mask_top_k(logits_1V, one(top_k, torch.int64), int(top_k))
        if top_p < 1.0:
            logits_1V = reference.mask_top_p(logits_1V, one(top_p, torch.float64))
        probs_V = torch.softmax(logits_1V[0].double(), dim=0)
        end = float(probs_V[: token + 1].sum())
        begin = end - float(probs_V[token])
        assert begin - TOLERANCE <= uniform <= end + TOLERANCE, (
            f"row {row}: token {token} is drawn from {begin} to {end}, not at {uniform}"
        )


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    launch = f"host {row['launch_us']:6.0f} us" if "launch_us" in row else ""
    plain = f"  PyTorch {row['pytorch_us']:.0f} us" if "pytorch_us" in row else ""
    return (
        f"{row['case']:<14} {row['rows']:>4} rows  spread {row['spread']:3.1f}  "
        f"{row['us']:8.1f} us  {row['share_of_reading']:6.1%} of reading  {launch}{plain}"
    )


if __name__ == "__main__":
    main()
