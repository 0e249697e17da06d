"""The few collectives that the layers need, over one torch process group.

A communicator of size 1 never touches torch.distributed, so a single rank needs no process group.
Shape legend: T rows over all ranks, H row width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class PeerLostError(RuntimeError):
    """A collective failed, most likely because a peer died: that peer is the one to blame."""


@contextmanager
def _peers_needed() -> Iterator[None]:
    """Turn the backends' many errors into `PeerLostError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # this rank's own failure
    except RuntimeError as error:
        raise PeerLostError(str(error)) from error


class Communicator:
    """Collectives among ``size`` ranks of which this one is number ``rank``."""

    def __init__(self, size: int, rank: int, group: dist.ProcessGroup | None = None) -> None:
        assert size == 1 or group is not None
        self.size = size
        self.rank = rank
        self._group = group

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Torch's, None where there is but one rank."""
        return self._group

    def meet(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            with _peers_needed():
                dist.barrier(group=self._group)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks; it may be ``x``, which is overwritten then."""
        if self.size > 1:
            with _peers_needed():
                dist.all_reduce(x, group=self._group)
        return x

    def all_reduce_rows(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The same, in float32 and rounded to the type of ``x_TH`` once."""
        return self.all_reduce(x_TH.to(torch.float32)).to(x_TH.dtype)

    def all_gather_rows(self, x_TH: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Concatenate every rank's rows, [sum(counts), H]; rank r brings ``counts[r]`` rows."""
        if self.size == 1:
            return x_TH
        longest = max(counts)
        padded = x_TH.new_zeros(longest, *x_TH.shape[1:])
        padded[: x_TH.shape[0]] = x_TH
        gathered = [torch.empty_like(padded) for _ in counts]
        with _peers_needed():
            dist.all_gather(gathered, padded, group=self._group)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    def gather_columns(self, x_TH: torch.Tensor) -> torch.Tensor | None:
        """Concatenate equal-width columns on rank 0, [T, H × size]; None on the other ranks."""
        if self.size == 1:
            return x_TH
        x_TH = x_TH.contiguous()
        parts = [torch.empty_like(x_TH) for _ in range(self.size)] if self.rank == 0 else None
        with _peers_needed():
            dist.gather(x_TH, parts, group=self._group, group_dst=0)
        return torch.cat(parts, dim=-1) if parts is not None else None

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrite ``x`` with rank 0's; returns ``x``."""
        if self.size > 1:
            with _peers_needed():
                dist.broadcast(x, group=self._group, group_src=0)
        return x

    def all_to_all_rows(
        self, x_TH: torch.Tensor, send_counts: list[int], recv_counts: list[int]
    ) -> torch.Tensor:
        """Send the first ``send_counts[0]`` rows to rank 0, the next to rank 1, and so on.

        Returns what the ranks sent here, in rank order, [sum(recv_counts), H].
        """
        if self.size == 1:
            return x_TH
        received = x_TH.new_empty(sum(recv_counts), *x_TH.shape[1:])
        with _peers_needed():
            dist.all_to_all_single(
                received, x_TH.contiguous(), recv_counts, send_counts, group=self._group
            )
        return received
