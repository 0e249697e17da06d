"""Every CUDA kernel once at small edge shapes, for NVIDIA's sanitizers:

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.kernels.sanitize_cuda
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.kernels.sanitize_cuda
    compute-sanitizer --tool synccheck --error-exitcode 1 python -m tests.kernels.sanitize_cuda

Words after the command choose kernels by their names ("grouped", "streaming linear", "counts").
Results are compared with float32, so that a run that does nothing fails. Every tensor has memory of
its own from the driver, so that memcheck sees the first byte that is read or written beside it.
"""

from __future__ import annotations

import os
import sys
import time

# Read when PyTorch is loaded.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from moe_engine.ops import hopper
from tests.kernels.hopper_cases import all_cases


def main(words: list[str]) -> None:
    """Run the cases of all kernels, or of those whose names have one of the words in them."""
    if not torch.cuda.is_available() or hopper.extension(torch.device("cuda", 0)) is None:
        raise SystemExit("needs a GPU of compute capability 9.0 and moe_engine._C")
    torch.manual_seed(0)
    chosen = {
        kernel: cases
        for kernel, cases in all_cases().items()
        if not words or any(word in kernel for word in words)
    }
    if not chosen:
        raise SystemExit(f"no kernel is called {' or '.join(words)}: {', '.join(all_cases())}")
    for kernel, cases in chosen.items():
        start = time.monotonic()
        for name, run in cases:
            try:
                run()
                torch.cuda.synchronize()
            except Exception:
                print(f"{kernel}: {name}", file=sys.stderr)
                raise
        print(f"{kernel}: {len(cases)} cases, {time.monotonic() - start:.1f} s", flush=True)
    print(f"{sum(map(len, chosen.values()))} cases match float32.")


if __name__ == "__main__":
    main(sys.argv[1:])
