"""Ranks that reach each other's memory, and what they share for an exchange.

Shape legend: T tokens, K experts per token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from moe_engine.dist.buffer import SharedBuffer, symmetric_buffer, virtual_buffers
from moe_engine.dist.communicator import Communicator
from moe_engine.dist.exchange.base import ExpertShard
from moe_engine.dist.topology import Topology, from_places, gpu_place, one_domain
from moe_engine.errors import ConfigError, ExchangeTimeout
from moe_engine.ops import native, tuning

MAX_TOP_K = 32
FP8_GROUP, FP8_GROUP_BYTES = 128, 132
"""Elements that share a scale on the wire, and what they take with it (`csrc/exchange_fp8.cuh`)."""
FP8_HIDDEN = 4 * FP8_GROUP
"""Rows in FP8 are multiples of so many elements, which take a multiple of 16 bytes."""
_PHASES = {1: "dispatch", 2: "combine", 3: "all-reduce", 4: "all-gather"}
_FIRST_COUNTERS = (1, 0, 1, 0)
"""The number of the first exchange, blocks that have ended it, and the same of collectives."""
_ELEMENT_TYPES = {
    torch.bfloat16: "BFLOAT16",
    torch.float16: "FLOAT16",
    torch.float32: "FLOAT32",
}


@dataclass(frozen=True)
class ExchangeShape:
    """What the buffers of an exchange are made for.

    Attributes:
        max_tokens: that a rank may bring in a step.
        packet_tokens: of a rank, up to which steps go by packets; 0: none.
        replicated_tokens: of a step, up to which no token travels where all ranks have all of them.
        apart_tokens: of a rank, up to which combine leaves the norm behind it to itself.
        reduced_rows: that a collective of a group may take of a rank by packets.
        multicast_rows: that `NvlinkDomain.all_reduce` may sum over all ranks by the switches
            between them, which have to offer that; 0: none.
        fp8: whether rows go to the experts in 8 bits, by groups of 128 elements with a scale.
    """

    num_ranks: int
    num_experts: int
    top_k: int
    hidden: int
    dtype: torch.dtype
    max_tokens: int
    packet_tokens: int = 0
    replicated_tokens: int = 0
    apart_tokens: int = 0
    reduced_rows: int = 0
    multicast_rows: int = 0
    fp8: bool = False

    def __post_init__(self) -> None:
        """`ValueError` where the kernels cannot move rows like these."""
        if self.dtype not in _ELEMENT_TYPES:
            raise ValueError(f"dtype is {self.dtype}; it is one of {list(_ELEMENT_TYPES)}")
        if self.row_bytes % 16:
            raise ValueError(
                f"hidden is {self.hidden}, {self.row_bytes} bytes a row; rows are multiples of 16"
            )
        if self.fp8 and (self.dtype == torch.float32 or self.hidden % FP8_HIDDEN):
            raise ValueError(
                f"fp8 of {self.hidden} elements of {self.dtype}; it is for multiples of "
                f"{FP8_HIDDEN} elements of 16 bits"
            )
        if self.num_experts % self.num_ranks:
            raise ValueError(f"num_experts is {self.num_experts} on {self.num_ranks} ranks")
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"top_k is {self.top_k}; it is from 1 to {MAX_TOP_K}")

    @property
    def row_bytes(self) -> int:
        """Of a token."""
        return self.hidden * self.dtype.itemsize

    @property
    def wire_bytes(self) -> int:
        """Of a token on its way to the experts."""
        return self.hidden // FP8_GROUP * FP8_GROUP_BYTES if self.fp8 else self.row_bytes

    def tuning_sizes(self, ranks_per_gpu: int) -> tuple[int, ...]:
        """What the choice between packets and rows holds for."""
        return self.num_ranks, ranks_per_gpu, self.row_bytes, self.wire_bytes

    def with_measured_limits(self, device: torch.device, ranks_per_gpu: int = 1) -> ExchangeShape:
        """The same with the limits of tokens that are best by the GPU's table."""
        sizes = self.tuning_sizes(ranks_per_gpu)
        chosen = tuning.choices(tuning.ExchangeChoices, device, *sizes)
        return replace(
            self,
            packet_tokens=chosen.packet_tokens,
            replicated_tokens=chosen.replicated_tokens,
            apart_tokens=chosen.apart_tokens,
        )

    def layout(self, library: ModuleType) -> Any:
        """The `ExchangeLayout` of ``moe_engine._C``."""
        return library.ExchangeLayout(
            num_ranks=self.num_ranks,
            max_tokens=self.max_tokens,
            packet_tokens=min(self.packet_tokens, self.max_tokens),
            reduced_rows=self.reduced_rows,
            multicast_rows=self.multicast_rows,
            row_bytes=self.row_bytes,
            wire_bytes=self.wire_bytes,
            top_k=self.top_k,
        )


class NvlinkDomain:
    """A rank among those whose memory it can write to, and what they share.

    Attributes:
        pending_combine: the last one that was left to the norm behind it; private to the exchange.

    Args:
        buffer: of `ExchangeShape.layout(...).total_bytes`.
        topology: of the ranks.
        timeout: seconds after which a rank that does not send is given up.
        num_blocks: of a kernel that waits; all of them have to run side by side.
        shares_gpu: whether other ranks run on the same GPU, so that kernels that follow must not
            take multiprocessors while one waits.
    """

    def __init__(
        self,
        shape: ExchangeShape,
        shard: ExpertShard,
        buffer: SharedBuffer,
        topology: Topology,
        timeout: float,
        num_blocks: int,
        shares_gpu: bool = False,
    ) -> None:
        device = buffer.own.device
        library = native.cuda_extension(device)
        assert library is not None
        self.shape = shape
        self.shard = shard
        self.library = library
        self.layout = shape.layout(library)
        assert buffer.own.numel() >= self.layout.total_bytes, buffer.own.shape
        self.pending_combine: Any = None
        self._buffer = buffer
        self._counters = torch.tensor(_FIRST_COUNTERS, dtype=torch.int32, device=device)
        # The GPU writes it while the host reads.
        self._report = torch.zeros(1, dtype=torch.int64).pin_memory()
        self.state = library.ExchangeState(
            layout=self.layout,
            type=getattr(library.ElementType, _ELEMENT_TYPES[shape.dtype]),
            is_fp8=shape.fp8,
            rank=shard.rank,
            num_local=shard.num_local,
            buffers=list(buffer.addresses),
            multicast=buffer.multicast_address,
            order=topology.visiting_order(shard.rank),
            counters=self._counters.data_ptr(),
            abort_report=self._report.data_ptr(),
            timeout_ns=round(timeout * 1e9),
            num_blocks=num_blocks,
            next_may_start=not shares_gpu,
        )

    @property
    def num_bytes(self) -> int:
        """Of this rank's buffer."""
        return self._buffer.own.numel()

    def check(self) -> None:
        """After the device has ended a step: whether its exchanges were complete.

        Raises:
            ExchangeTimeout: one was given up; everything since then is worthless, until `reset`.
        """
        report = int(self._report[0]) & (1 << 64) - 1
        if report:
            epoch, phase = report & 0xFFFFFFFF, report >> 32 & 0xFF
            waiter, missing = report >> 40 & 0xFF, report >> 48 & 0xFF
            raise ExchangeTimeout(missing, waiter, _PHASES[phase], epoch)

    def reset(self) -> None:
        """Begin anew after `ExchangeTimeout`.

        No rank may have an exchange under way before all have done so.
        """
        self._buffer.own.zero_()
        self._counters.copy_(torch.tensor(_FIRST_COUNTERS, dtype=torch.int32))
        torch.cuda.synchronize(self._buffer.own.device)
        self._report.zero_()

    def most_reduced_rows(self, ranks: range) -> int:
        """How many `all_reduce` takes at once over these ranks."""
        shape = self.shape
        in_network = self._buffer.multicast_address and len(ranks) == shape.num_ranks
        return max(shape.reduced_rows, shape.multicast_rows if in_network else 0)

    def all_reduce(self, x_TH: torch.Tensor, ranks: range) -> torch.Tensor:
        """The sum of what these ranks, of which this is one, bring; [T, H], the same bits on all.

        In float32, rounded once; in the order of the ranks, up to `ExchangeShape.reduced_rows`.
        Always over the same ranks.

        More rows go by multicast, in the order that the switches choose: it sends fewer bytes, but
        a sum takes several ways behind each other, and packets one.

        Args:
            x_TH: up to `most_reduced_rows`, as many on each of them.
        """
        shape = self.shape
        in_network = shape.reduced_rows < min(len(x_TH), self.most_reduced_rows(ranks))
        assert self.shard.rank in ranks, (self.shard.rank, ranks)
        assert x_TH.shape[1:] == (shape.hidden,), x_TH.shape
        assert x_TH.dtype == shape.dtype, x_TH.dtype
        assert x_TH.is_contiguous(), x_TH.stride()
        assert not in_network or x_TH.data_ptr() % 16 == 0, x_TH.data_ptr()
        out_TH = torch.empty_like(x_TH)
        if native.compiles_only():
            return out_TH
        with torch.cuda.device(x_TH.device):
            self.library.exchange_all_reduce(
                self.state,
                by_packets=not in_network,
                x=x_TH.data_ptr(),
                out=out_TH.data_ptr(),
                num_rows=len(x_TH),
                first_rank=ranks.start,
                group_size=len(ranks),
                stream=torch.cuda.current_stream().cuda_stream,
            )
        return out_TH

    def all_gather(
        self, x: torch.Tensor, out: torch.Tensor, num_bytes: Sequence[int], ranks: range
    ) -> torch.Tensor:
        """What these ranks, of which this is one, bring, side by side; returns ``out``.

        Always over the same ranks as `all_reduce`.

        Args:
            x: as many bytes as this rank brings.
            out: as many as all bring; may be ``x`` where one rank alone brings any.
            num_bytes: of each of them, multiples of 4, each up to ``reduced_rows`` rows.
        """
        own = num_bytes[self.shard.rank - ranks.start]
        assert len(num_bytes) == len(ranks), (num_bytes, ranks)
        assert x.is_contiguous(), x.stride()
        assert out.is_contiguous(), out.stride()
        assert own in (0, x.nbytes), (own, x.nbytes)
        assert out.nbytes == sum(num_bytes), (out.nbytes, num_bytes)
        if native.compiles_only():
            return out
        with torch.cuda.device(x.device):
            self.library.exchange_all_gather(
                self.state,
                x=x.data_ptr(),
                out=out.data_ptr(),
                num_bytes=num_bytes,
                first_rank=ranks.start,
                stream=torch.cuda.current_stream().cuda_stream,
            )
        return out

    def section(self, offset: int, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
        """A view of this rank's buffer, from a byte on."""
        num_bytes = dtype.itemsize
        for size in sizes:
            num_bytes *= size
        return self._buffer.own[offset : offset + num_bytes].view(dtype).view(sizes)


def join_domain(
    shape: ExchangeShape,
    ep: Communicator,
    device: torch.device,
    timeout: float,
    topology: Topology | None = None,
) -> NvlinkDomain:
    """This rank's place among ranks with a GPU each, all of which reach each other (a collective).

    Args:
        topology: None: as the machines say.

    Raises:
        ConfigError: the CUDA extension is missing, the GPUs do not reach each other, or there is no
            multicast among them where the shape asks for it.
    """
    library = native.cuda_extension(device) if device.type == "cuda" else None
    if library is None:
        raise ConfigError(
            f"exchange is 'nvlink', which needs GPUs and the CUDA extension moe_engine._C: {device}"
        )
    if ep.group is None:
        raise ConfigError("exchange is 'nvlink', which needs two or more ranks, and there is one")
    if topology is None:
        places: list[Any] = [None] * ep.size
        torch.distributed.all_gather_object(places, gpu_place(device), group=ep.group)
        topology = from_places(places)
    if len(domains := topology.domains()) > 1:
        raise ConfigError(f"exchange is 'nvlink', and ranks are in NVLink domains {domains}")
    try:
        num_bytes = shape.layout(library).total_bytes
        buffer = symmetric_buffer(num_bytes, ep.group, device, shape.multicast_rows > 0)
    except RuntimeError as error:
        raise ConfigError(
            f"exchange is 'nvlink', and the GPUs cannot share memory: {error}"
        ) from error
    if shape.multicast_rows and not buffer.multicast_address:
        raise ConfigError(
            f"in_network_reduction is on, and PyTorch has no multicast address for what the GPUs "
            f"share: {device} or the switches do not offer it, or TORCH_SYMM_MEM_DISABLE_MULTICAST "
            f"is set"
        )
    shard = ExpertShard(shape.num_experts, ep.size, ep.rank)
    num_blocks = torch.cuda.get_device_properties(device).multi_processor_count
    return NvlinkDomain(shape, shard, buffer, topology, timeout, num_blocks)


def virtual_domains(
    shape: ExchangeShape,
    device: torch.device,
    timeout: float = 10.0,
    topology: Topology | None = None,
    num_blocks: int | None = None,
) -> list[NvlinkDomain]:
    """All ranks of an exchange, in this process on one GPU; each needs a stream of its own.

    Args:
        num_blocks: of a rank's kernel that waits; None: its share of one for each multiprocessor.
    """
    topology = topology or one_domain(shape.num_ranks)
    library = native.cuda_extension(device)
    assert library is not None
    buffers = virtual_buffers(shape.num_ranks, shape.layout(library).total_bytes, device)
    if num_blocks is None:
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        num_blocks = max(1, multiprocessors // shape.num_ranks)
    return [
        NvlinkDomain(
            shape,
            ExpertShard(shape.num_experts, shape.num_ranks, rank),
            buffer,
            topology,
            timeout,
            num_blocks,
            shares_gpu=True,
        )
        for rank, buffer in enumerate(buffers)
    ]
