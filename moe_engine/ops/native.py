"""Which compiled implementations this installation and this GPU can run.

Both are optional: without them every operation runs on its PyTorch reference. That is slow on a
GPU, so the first time it happens there, the log says why.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

from moe_engine.log import get_logger

logger = get_logger(__name__)


@functools.cache
def cuda_extension(device: torch.device) -> ModuleType | None:
    """`moe_engine._C`, or None (logged once) if it cannot run on this CUDA device."""
    try:
        from moe_engine import _C
    except ImportError as error:
        logger.warning(
            "Triton and PyTorch do the work of the CUDA kernels on %s: moe_engine._C cannot be "
            "imported (%s). To see why it was not built: MOE_ENGINE_REQUIRE_CUDA=1 "
            "pip install -v -e .",
            device,
            error,
        )
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if f"{major}{minor}a" not in _C.CUDA_ARCHS.split(","):
        logger.warning(
            "Triton and PyTorch do the work of the CUDA kernels on %s: it has compute capability "
            "%d.%d, and moe_engine._C was built for %s.",
            device,
            major,
            minor,
            _C.CUDA_ARCHS,
        )
        return None
    return _C


@functools.cache
def has_triton() -> bool:
    """Whether Triton and our kernels for it are installed; logged once if they are not."""
    if importlib.util.find_spec("triton") is None:
        logger.warning(
            "PyTorch does the work of the Triton kernels: triton is not installed. "
            "The extras [cu12] and [cu13] bring it."
        )
        return False
    if importlib.util.find_spec("moe_engine.kernels") is None:
        logger.warning(
            "PyTorch does the work of the Triton kernels: moe_engine.kernels is missing beside %s. "
            "In a clone whose package was installed without -e, run from another directory, or "
            "install with pip install -e .",
            __file__,
        )
        return False
    return True


def compiles_only() -> bool:
    """Whether Triton's kernels are only compiled now, and those of the extension left out."""
    if not has_triton():
        return False
    from moe_engine.kernels import launch

    only: bool = launch.compiles_only()
    return only
