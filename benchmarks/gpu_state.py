"""What the driver says of the first GPU."""

from __future__ import annotations

import subprocess
from typing import Any


def gpu_state() -> dict[str, Any]:
    """Name, driver and memory of the first GPU, from nvidia-smi, in its units (MiB)."""
    fields = ("name", "driver_version", "memory.used", "memory.total")
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}"]
    done = subprocess.run(
        [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
    )
    return dict(zip(fields, map(str.strip, done.stdout.strip().split(",")), strict=True))
