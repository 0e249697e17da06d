"""What a run on the first GPU finds there: what the driver says, and kernels compiled before."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any


def require_gpu() -> None:
    """`SystemExit` without an NVIDIA GPU that PyTorch can use."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU, and a build of PyTorch for CUDA")


def gpu_state() -> dict[str, Any]:
    """Name, driver and memory of the first GPU, from nvidia-smi, in its units (MiB)."""
    fields = ("name", "driver_version", "memory.used", "memory.total")
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}"]
    done = subprocess.run(
        [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
    )
    return dict(zip(fields, map(str.strip, done.stdout.strip().split(",")), strict=True))


def triton_cache() -> str:
    """Whether Triton will find compiled kernels on disk: "filled", or "empty"."""
    home = os.environ.get("TRITON_HOME", Path.home())
    folder = Path(os.environ.get("TRITON_CACHE_DIR", Path(home) / ".triton" / "cache"))
    return "filled" if folder.is_dir() and any(folder.iterdir()) else "empty"
