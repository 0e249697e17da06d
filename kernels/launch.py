"""What launches share: the launch itself, programmatic dependent launch, the room for it,
prefetching, and counters that stay zero.

**Compiling only.** Inside `compile_only`, `launch_kernel` compiles a kernel for its arguments and
does not run it. So what a step will launch can be compiled by going through the step, whatever its
tensors hold: there is no list of kernels to keep in step with the code.

Programmatic dependent launch (PDL, compute capability 9.0 and later) lets a kernel start while the
one before it ends. A kernel launched with it calls ``gdc_wait`` in every program before it touches
what an earlier kernel wrote or still reads, so that its own end implies the end of all before it.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl

# One stream's arrival counters, and how many streams of a device get their own: 1 MiB in all, which
# PyTorch's allocator takes from its pool of small tensors.
COUNTERS_PER_STREAM = 1 << 14
NUM_STREAMS = 16

_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)


def compiles_only() -> bool:
    """Whether this thread is inside `compile_only`."""
    return _compiles_only.get()


@contextmanager
def compile_only() -> Iterator[None]:
    """Compile kernels instead of running them, in this thread; their outputs stay unwritten."""
    token = _compiles_only.set(True)
    try:
        yield
    finally:
        _compiles_only.reset(token)


def launch_kernel(kernel: Any, grid: tuple[int, ...], /, *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` of a Triton kernel; see `compile_only`."""
    if _compiles_only.get():
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Whether kernels on ``device`` can be launched with ``launch_pdl=True``."""
    if device.type != "cuda" or torch.version.cuda is None or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def shared_bytes(device: torch.device) -> int | None:
    """Bytes of shared memory that a program may have on ``device``; None on a CPU: any."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@triton.jit
def prefetch_to_l2(pointers):
    """Start to bring the cache lines behind ``pointers`` into L2; every pointer has to be valid.

    It changes nothing that any program sees, so it may come before ``gdc_wait`` for whatever lies
    at addresses that are known by then. There is no such instruction in the interpreter.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def arrival_counters(device: torch.device) -> torch.Tensor:
    """int32 [`COUNTERS_PER_STREAM`] of the current stream, zero between kernels.

    A kernel whose programs share a piece of work counts them in here; the last to arrive finishes
    the work and sets the counter to zero again, so a replayed CUDA graph finds it as it was.
    Kernels on one stream never overlap, so they may use the same counters; graphs captured on the
    same stream must not be replayed at the same time on different ones.

    Raises:
        RuntimeError: the first call for a device is made while a CUDA graph is captured, or more
            than `NUM_STREAMS` streams of a device have asked.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _stream_counters(device, stream)


@functools.cache
def _stream_counters(device: torch.device, stream: int) -> torch.Tensor:
    pool, is_zero = _counter_pool(device)
    # A capture cannot wait for an event from before it, and need not: it starts on an idle device.
    if is_zero is not None and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).wait_event(is_zero)
    number = next(_slices[device])
    if number >= NUM_STREAMS:
        raise RuntimeError(
            f"kernels that count arrivals were launched on more than {NUM_STREAMS} streams of "
            f"{device}; streams that shared counters could wait for each other forever, so launch "
            "on fewer or raise NUM_STREAMS"
        )
    return pool[number]


_slices: defaultdict[torch.device, Iterator[int]] = defaultdict(itertools.count)


@functools.cache
def _counter_pool(device: torch.device) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Counters for every stream, and the event after which they are zero (None on a CPU)."""
    if device.type != "cuda":
        return torch.zeros(NUM_STREAMS, COUNTERS_PER_STREAM, dtype=torch.int32), None
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first use of the arrival counters is inside a CUDA graph capture, which would "
            "only record that they are set to zero; run the kernel once before capturing"
        )
    pool = torch.zeros(NUM_STREAMS, COUNTERS_PER_STREAM, dtype=torch.int32, device=device)
    is_zero = torch.cuda.Event()
    is_zero.record(torch.cuda.current_stream(device))
    return pool, is_zero
