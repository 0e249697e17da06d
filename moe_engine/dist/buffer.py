"""Memory that the ranks of an exchange share: each has a buffer of the same size, and reads and
writes all of them.

Over NVLink the buffers are PyTorch's symmetric memory. Virtual ranks, several in one process on one
GPU, have theirs side by side in one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_engine import env


@dataclass(frozen=True)
class SharedBuffer:
    """One rank's view.

    Attributes:
        own: its own buffer, uint8 [bytes], zeros at first.
        addresses: of every rank's buffer, as this process sees it, in the order of the ranks.
        keeps: what must live as long as the addresses are used.
        multicast_address: of all of them at once, where the switches add up and spread; 0: none.
    """

    own: torch.Tensor
    addresses: tuple[int, ...]
    keeps: Any = None
    multicast_address: int = 0


def symmetric_buffer(
    num_bytes: int,
    group: torch.distributed.ProcessGroup,
    device: torch.device,
    with_multicast: bool = False,
) -> SharedBuffer:
    """A collective over ``group``, whose ranks have a GPU each that reaches those of the others.

    Args:
        with_multicast: let PyTorch make a multicast address, where it finds that it can.

    Raises:
        RuntimeError: PyTorch's, if the GPUs do not reach each other.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    if not with_multicast:
        env.share_without_multicast()
    own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    own.zero_()
    torch.cuda.synchronize(device)
    handle = symmetric_memory.rendezvous(own, group)
    addresses = tuple(handle.buffer_ptrs)
    assert addresses[handle.rank] == own.data_ptr(), "the buffer begins where its memory does"
    torch.distributed.barrier(group)  # nobody writes to what is still to become zero
    return SharedBuffer(own, addresses, handle, handle.multicast_ptr if with_multicast else 0)


def virtual_buffers(num_ranks: int, num_bytes: int, device: torch.device) -> list[SharedBuffer]:
    """Those of ranks that share a process and a GPU."""
    stride = -(-num_bytes // 256) * 256
    together = torch.zeros(num_ranks, stride, dtype=torch.uint8, device=device)
    addresses = tuple(together.data_ptr() + rank * stride for rank in range(num_ranks))
    return [SharedBuffer(together[rank, :num_bytes], addresses) for rank in range(num_ranks)]
