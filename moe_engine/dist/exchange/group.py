"""The collectives of an attention-TP group: what is little goes by our own kernels, in one launch.

Shape legend: T tokens, H hidden size.
"""

from __future__ import annotations

import torch

from moe_engine.dist.communicator import Communicator
from moe_engine.dist.exchange.domain import NvlinkDomain

MOST_SENT_BYTES = 2 << 20
"""That a rank sends in a collective by packets, to all others together.

Every packet goes to each of them, so with more data torch's backend is faster, whose rings send
everything about twice. To be measured between GPUs.
"""


def rows_by_packets(group_size: int, row_bytes: int) -> int:
    """Up to how many rows of each rank of a group are summed by packets.

    Example: in a group of 4, 85 rows of 8 KB.
    """
    if group_size == 1:
        return 0
    return max(1, MOST_SENT_BYTES // ((group_size - 1) * row_bytes))


class PacketCommunicator(Communicator):
    """Like another one of the same ranks, which has what packets do not.

    Args:
        domain: of more ranks, perhaps; its ``reduced_rows`` say how much goes by packets.
        ranks: of the group, by their numbers in the domain.
    """

    def __init__(self, others: Communicator, domain: NvlinkDomain, ranks: range) -> None:
        assert others.size == len(ranks), (others.size, ranks)
        assert domain.shard.rank == ranks[others.rank], (domain.shard.rank, ranks, others.rank)
        self.size, self.rank = others.size, others.rank
        self._others = others
        self._domain = domain
        self._ranks = ranks
        self._most_reduced_rows = domain.most_reduced_rows(ranks)
        self._most_bytes = domain.shape.reduced_rows * domain.shape.row_bytes

    @property
    def group(self) -> torch.distributed.ProcessGroup | None:
        """See `Communicator.group`."""
        return self._others.group

    def meet(self) -> None:
        """See `Communicator.meet`."""
        self._others.meet()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `Communicator.all_reduce`; sums are taken in float32 and rounded once."""
        if not self._sums(x):
            return self._others.all_reduce(x)
        return self._domain.all_reduce(x, self._ranks) if len(x) else x

    def all_reduce_rows(self, x_TH: torch.Tensor) -> torch.Tensor:
        """See `Communicator.all_reduce_rows`."""
        return self.all_reduce(x_TH) if self._sums(x_TH) else self._others.all_reduce_rows(x_TH)

    def all_gather_rows(self, x_TH: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """See `Communicator.all_gather_rows`."""
        row_bytes = x_TH.shape[1:].numel() * x_TH.itemsize
        num_bytes = [count * row_bytes for count in counts]
        if not self._takes(num_bytes):
            return self._others.all_gather_rows(x_TH, counts) if any(counts) else x_TH
        out_TH = x_TH.new_empty(sum(counts), *x_TH.shape[1:])
        return self._domain.all_gather(x_TH.contiguous(), out_TH, num_bytes, self._ranks)

    def gather_columns(self, x_TH: torch.Tensor) -> torch.Tensor | None:
        """See `Communicator.gather_columns`."""
        num_bytes = [x_TH.nbytes] * self.size
        if not self._takes(num_bytes):
            return self._others.gather_columns(x_TH)
        parts_NTH = x_TH.new_empty(self.size, *x_TH.shape)
        self._domain.all_gather(x_TH.contiguous(), parts_NTH, num_bytes, self._ranks)
        return parts_NTH.transpose(0, 1).flatten(1) if self.rank == 0 else None

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """See `Communicator.broadcast`."""
        num_bytes = [x.nbytes] + [0] * (self.size - 1)
        if not self._takes(num_bytes) or not x.is_contiguous():
            return self._others.broadcast(x)
        return self._domain.all_gather(x, x, num_bytes, self._ranks)

    def all_to_all_rows(
        self, x_TH: torch.Tensor, send_counts: list[int], recv_counts: list[int]
    ) -> torch.Tensor:
        """See `Communicator.all_to_all_rows`."""
        return self._others.all_to_all_rows(x_TH, send_counts, recv_counts)

    def _sums(self, x: torch.Tensor) -> bool:
        """Whether the domain adds these up."""
        shape = self._domain.shape
        are_rows = x.shape[1:] == (shape.hidden,) and x.dtype == shape.dtype
        return are_rows and x.is_contiguous() and len(x) <= self._most_reduced_rows

    def _takes(self, num_bytes: list[int]) -> bool:
        """Whether the ranks' data, of which there is some, can go by packets."""
        return any(num_bytes) and all(n <= self._most_bytes and n % 4 == 0 for n in num_bytes)
