"""Whether tests of the CUDA kernels for Hopper can run: they skip elsewhere, but not for a build.

The fixture `needs_hopper` calls `need_hopper` for whole modules; `need_hoppers` is for tests of
several GPUs, and `need_multicast` for those that make multicast objects.
"""

from __future__ import annotations

import os

import pytest
import torch

from moe_engine.ops import hopper

MULTICAST_VARIABLE = "MOE_ENGINE_TEST_MULTICAST"


def on_hopper() -> bool:
    """Whether the current device is a GPU of compute capability 9.0."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def need_hopper() -> None:
    """Skip the test elsewhere; on Hopper, fail it if the kernels are missing."""
    if not on_hopper():
        pytest.skip("needs a GPU of compute capability 9.0")
    if hopper.extension(torch.device("cuda", torch.cuda.current_device())) is None:
        pytest.fail(
            "this GPU has compute capability 9.0, but moe_engine._C cannot be imported or was not "
            "built for it; to see why: MOE_ENGINE_REQUIRE_CUDA=1 pip install -v ."
        )


def need_hoppers(number: int) -> None:
    """The same of tests that need so many GPUs."""
    if (found := torch.cuda.device_count()) < number:
        pytest.skip(f"needs {number} GPUs of compute capability 9.0, not {found}")
    need_hopper()


def need_multicast(number: int) -> None:
    """Skip a test of multicast among so many GPUs unless they report it and somebody asks for it.

    To make a multicast object can fail, or worse, on a system that reports that it offers them.
    """
    if os.environ.get(MULTICAST_VARIABLE) != "1":
        pytest.skip(f"makes multicast objects, which {MULTICAST_VARIABLE}=1 allows")
    need_hoppers(number)
    build = hopper.extension(torch.device("cuda", 0))
    if not all(build.device_properties(device)["multicast"] for device in range(number)):
        pytest.skip(f"needs {number} GPUs that report multicast")
