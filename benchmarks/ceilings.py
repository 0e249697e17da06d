"""What the machine can do at most, in the run that is held against it.

    python -m benchmarks.ceilings --device cuda

prints one JSON object. `run` starts it as a process of its own, so that the caller keeps no memory
on the device. Medians of several repetitions. There are three ceilings, each for another kind of
work:

- reading (``read_gb_per_s``): what only reads, as a decode step does with its weights. The faster
  of a sum over float32 (``sum_gb_per_s``) and of a copy;
- copying (``copy_gb_per_s``): what reads and writes, each byte of either counted;
- a matrix product (``matmul_tflop_per_s``): what computes. bfloat16 on a GPU, float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.clock import time_call

GPU_BYTES, CPU_BYTES = 8 << 30, 256 << 20
GPU_MATMUL, CPU_MATMUL = 8192, 2048
REPETITIONS = 7
# Kind of work -> entry of the result, and its unit in bytes/s or FLOP/s.
KINDS = {
    "read": ("read_gb_per_s", 1e9),
    "copy": ("copy_gb_per_s", 1e9),
    "matmul": ("matmul_tflop_per_s", 1e12),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    print(json.dumps(measure(parser.parse_args().device)))


def run(device: str) -> dict[str, Any]:
    """The ceilings of a device, measured by another process."""
    command = [sys.executable, "-m", "benchmarks.ceilings", "--device", device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def rate(ceilings: dict[str, Any], kind: str) -> float:
    """The ceiling of a kind of work, "read", "copy" or "matmul", in bytes/s or FLOP/s."""
    entry, unit = KINDS[kind]
    return float(ceilings[entry] * unit)


def describe(ceilings: dict[str, Any]) -> str:
    """One line, e.g. ``NVIDIA H200: reads 4.42 TB/s, copies 4.23 TB/s, multiplies 791 TFLOP/s``."""
    return (
        f"{ceilings['device']}: reads {rate(ceilings, 'read') / 1e12:.2f} TB/s, copies "
        f"{rate(ceilings, 'copy') / 1e12:.2f} TB/s, multiplies "
        f"{rate(ceilings, 'matmul') / 1e12:.0f} TFLOP/s"
    )


def measure(device: str) -> dict[str, Any]:
    """Name, versions, and the ceilings of ``cpu`` or the first GPU."""
    import torch

    is_gpu = device == "cuda"
    dtype = torch.bfloat16 if is_gpu else torch.float32
    num_bytes = GPU_BYTES if is_gpu else CPU_BYTES
    size = GPU_MATMUL if is_gpu else CPU_MATMUL
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy_s = _median_seconds(lambda: target.copy_(source), is_gpu)
    sum_s = _median_seconds(source.sum, is_gpu)
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    matmul_s = _median_seconds(lambda: torch.mm(a, b), is_gpu)
    copy, read = 2 * num_bytes / copy_s / 1e9, num_bytes / sum_s / 1e9
    return {
        "device": torch.cuda.get_device_name() if is_gpu else platform.processor() or "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_gpu else None,
        "python": platform.python_version(),
        "copy_gb_per_s": copy,
        "sum_gb_per_s": read,
        "read_gb_per_s": max(copy, read),
        "matmul_tflop_per_s": 2 * size**3 / matmul_s / 1e12,
    }


def _median_seconds(function: Callable[[], object], is_gpu: bool) -> float:
    import torch

    def finish() -> None:
        function()
        if is_gpu:
            torch.cuda.synchronize()

    finish()  # warm up
    return statistics.median(time_call(finish) for _ in range(REPETITIONS))


if __name__ == "__main__":
    main()
