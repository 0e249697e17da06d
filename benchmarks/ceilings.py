"""What the machine can do at most, in the run that is held against it.

    python -m benchmarks.ceilings --device cuda

prints one JSON object. `run` starts it as a process of its own, so that the caller keeps no memory
on the GPU. Bandwidths count each byte read and each byte written; medians of several repetitions.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

GPU_BYTES, CPU_BYTES = 8 << 30, 256 << 20
GPU_MATMUL, CPU_MATMUL = 8192, 1024
REPETITIONS = 7


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


def measure(device: str) -> dict[str, Any]:
    """Name, versions, and the ceilings of ``cpu`` or the first GPU.

    ``read_gb_per_s`` is the faster of a sum over float32 and a copy (both directions counted): what
    a kernel that only reads can be held against.
    """
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

    seconds = []
    for repetition in range(REPETITIONS + 1):
        start = time.perf_counter()
        function()
        if is_gpu:
            torch.cuda.synchronize()
        if repetition:  # the first one warms up
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
