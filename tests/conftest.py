"""Settings that must be in place before any test module is imported, and what modules need."""

from __future__ import annotations

import os
import shutil

import pytest

# Without a GPU, Triton kernels run in Triton's interpreter; it is chosen when Triton is imported.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"

# A hardware queue for each stream, so that no launch is behind one that waits for it. Read by CUDA.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# To load a kernel at its first launch waits for those that run, which may wait for that launch.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

# Tests run beside the ranks that they start: one thread each, which sleeps while it waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def needs_hopper() -> None:
    """See `tests.hopper_device`; comes before all fixtures that start something on the GPU."""
    from tests.hopper_device import need_hopper

    need_hopper()
