"""Exchange by our own kernels, which write into the memory of other ranks (`csrc/exchange.h`).

Shape legend: T tokens that this rank brings, m tokens that a rank may bring in a step, N ranks,
R = N * m slots, of which slot s * m + t is for token t of rank s, H hidden size, K experts per
token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_engine.dist.exchange.base import Received
from moe_engine.dist.exchange.domain import NvlinkDomain
from moe_engine.dist.exchange.replicas import Balancing
from moe_engine.ops import native
from moe_engine.ops.moe import ExpertOutputs
from moe_engine.ops.norm import PendingRows


class NvlinkExchange:
    """The exchange of steps in which every rank brings up to ``step_tokens`` tokens."""

    shards_tokens = True
    is_capturable = True

    def __init__(self, domain: NvlinkDomain, step_tokens: int) -> None:
        if not 1 <= step_tokens <= domain.shape.max_tokens:
            raise ValueError(
                f"step_tokens is {step_tokens}; it is from 1 to {domain.shape.max_tokens}"
            )
        self._domain = domain
        self._step_tokens = step_tokens
        self._by_packets = step_tokens <= domain.shape.packet_tokens

    def dispatch(
        self,
        x_TH: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        balancing: Balancing | None = None,
    ) -> Received:
        """See `Exchange.dispatch`."""
        domain, shape = self._domain, self._domain.shape
        pending = domain.pending_combine
        assert pending is None or pending.is_launched, "nobody has taken the combine before"
        num_tokens = len(x_TH)
        assert num_tokens <= self._step_tokens, (num_tokens, self._step_tokens)
        assert x_TH.shape[1:] == (shape.hidden,), x_TH.shape
        assert x_TH.dtype == shape.dtype, x_TH.dtype
        assert expert_ids_TK.shape == weights_TK.shape == (num_tokens, shape.top_k)
        assert expert_ids_TK.dtype == torch.int32, expert_ids_TK.dtype
        assert weights_TK.dtype == torch.float32, weights_TK.dtype
        x_TH, ids_TK = x_TH.contiguous(), expert_ids_TK.contiguous()
        assert x_TH.data_ptr() % 16 == 0, x_TH.data_ptr()
        extras, sent_ids_TK = _for_balancing(balancing, ids_TK)
        received = self._received(x_TH, sent_ids_TK)
        if native.compiles_only():
            return received
        with torch.cuda.device(x_TH.device):
            domain.library.exchange_dispatch(
                domain.state,
                by_packets=self._by_packets,
                x=x_TH.data_ptr(),
                ids=ids_TK.data_ptr(),
                weights=weights_TK.contiguous().data_ptr(),
                num_tokens=num_tokens,
                step_tokens=self._step_tokens,
                received_x=received.x_RH.data_ptr(),
                received_slots=received.slot_ids_RK.data_ptr(),
                received_weights=received.weights_RK.data_ptr(),
                **extras,
                stream=torch.cuda.current_stream().cuda_stream,
            )
        return received

    def combine(
        self, y: torch.Tensor | ExpertOutputs, received: Received
    ) -> torch.Tensor | PendingRows:
        """See `Exchange.combine`; packets of some tokens leave their sum to the norm behind."""
        domain, step_tokens = self._domain, self._step_tokens
        pending = PendingCombine(domain, step_tokens, y, received)
        leaves = self._by_packets and step_tokens > domain.shape.apart_tokens
        if leaves and domain.library.exchange_combine_norm_fits(domain.layout):
            domain.pending_combine = pending
            return pending
        return pending.rows()

    def _received(self, x_TH: torch.Tensor, ids_TK: torch.Tensor) -> Received:
        """Tensors for what arrives: new ones, or those in the buffer where the rows land."""
        domain, shape, layout = self._domain, self._domain.shape, self._domain.layout
        num_slots, top_k = shape.num_ranks * self._step_tokens, shape.top_k
        num_pairs = self._step_tokens * top_k
        if self._by_packets:
            return Received(
                x_TH.new_empty(num_slots, shape.hidden),
                ids_TK.new_empty(num_slots, top_k),
                x_TH.new_empty(num_slots, top_k, dtype=torch.float32),
                num_pairs,
                ids_TK,
            )
        if shape.fp8:
            x_RH = x_TH.new_empty(num_slots, shape.hidden)
        else:
            x_RH = domain.section(layout.rows_at, shape.dtype, num_slots, shape.hidden)
        return Received(
            x_RH,
            domain.section(layout.slots_at, torch.int32, num_slots, top_k),
            domain.section(layout.weights_at, torch.float32, num_slots, top_k),
            num_pairs,
            ids_TK,
        )


class PendingCombine(PendingRows):
    """A combine that is launched by itself, or by packets together with the norm that follows.

    Attributes:
        is_launched: whether somebody has taken it, as has to be before the rank's next exchange.
    """

    def __init__(
        self,
        domain: NvlinkDomain,
        step_tokens: int,
        y: torch.Tensor | ExpertOutputs,
        received: Received,
    ) -> None:
        shape = domain.shape
        y_rows = y.y_PH if isinstance(y, ExpertOutputs) else y
        assert y_rows.dtype == shape.dtype, y_rows.dtype
        num_slots = len(received.slot_ids_RK)
        num_rows = num_slots if isinstance(y, torch.Tensor) else num_slots * shape.top_k
        assert y_rows.shape == (num_rows, shape.hidden), (y_rows.shape, num_rows, shape.hidden)
        assert y_rows.is_contiguous(), y_rows.stride()
        assert y_rows.data_ptr() % 16 == 0, y_rows.data_ptr()
        self._domain = domain
        self._step_tokens = step_tokens
        self._y_rows = y_rows
        self._is_summed = isinstance(y, torch.Tensor)
        self._received = received
        self.is_launched = False

    def rows(self) -> torch.Tensor:
        """See `PendingRows.rows`."""
        out_TH = self._new_rows()
        by_packets = self._step_tokens <= self._domain.shape.packet_tokens
        combine = self._domain.library.exchange_combine
        self._launch(combine, by_packets=by_packets, out=out_TH.data_ptr())
        return out_TH

    def add_rms_norm(
        self, residual_TH: torch.Tensor, norm_weight_H: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PendingRows.add_rms_norm`."""
        normed_TH, new_residual_TH = self._new_rows(), self._new_rows()
        assert residual_TH.shape == normed_TH.shape, (residual_TH.shape, normed_TH.shape)
        assert norm_weight_H.shape == normed_TH.shape[1:], norm_weight_H.shape
        residual_TH, norm_weight_H = residual_TH.contiguous(), norm_weight_H.contiguous()
        for given in (residual_TH, norm_weight_H):
            assert given.dtype == normed_TH.dtype, given.dtype
            assert given.data_ptr() % 16 == 0, given.data_ptr()
        self._launch(
            self._domain.library.exchange_combine_norm,
            residual=residual_TH.data_ptr(),
            norm_weight=norm_weight_H.data_ptr(),
            eps=eps,
            normed=normed_TH.data_ptr(),
            new_residual=new_residual_TH.data_ptr(),
        )
        return normed_TH, new_residual_TH

    def _new_rows(self) -> torch.Tensor:
        return self._y_rows.new_empty(len(self._received.route), self._domain.shape.hidden)

    def _launch(self, combine: Callable[..., None], **arguments: float) -> None:
        """One of the kernels, with arguments of its own."""
        assert not self.is_launched, "combined twice"
        self.is_launched = True
        if native.compiles_only():
            return
        received = self._received
        with torch.cuda.device(self._y_rows.device):
            combine(
                self._domain.state,
                y=self._y_rows.data_ptr(),
                is_summed=self._is_summed,
                slots=received.slot_ids_RK.data_ptr(),
                weights=received.weights_RK.data_ptr(),
                ids=received.route.data_ptr(),
                num_tokens=len(received.route),
                step_tokens=self._step_tokens,
                **arguments,
                stream=torch.cuda.current_stream().cuda_stream,
            )


def _for_balancing(
    balancing: Balancing | None, ids_TK: torch.Tensor
) -> tuple[dict[str, int], torch.Tensor]:
    """Arguments of the kernel, and the ids that it will have sent."""
    if balancing is None:
        return {}, ids_TK
    tags_T, table, load_2E = balancing.tags_T, balancing.replicas, balancing.load_2E
    assert tags_T.shape == ids_TK.shape[:1], tags_T.shape
    assert tags_T.dtype == torch.int32, tags_T.dtype
    assert tags_T.is_contiguous(), tags_T.stride()
    extras = {"tags": tags_T.data_ptr()}
    if load_2E is not None:
        assert load_2E.dtype == torch.int32, load_2E.dtype
        assert load_2E.is_contiguous(), load_2E.stride()
        extras |= {"load": load_2E.data_ptr(), "num_counted": load_2E.shape[1]}
    if table is None:
        return extras, ids_TK
    sent_ids_TK = torch.empty_like(ids_TK)
    num_experts, num_replicas = table.slots_ER.shape
    extras |= {
        "replica_slots": table.slots_ER.data_ptr(),
        "replica_bounds": table.bounds_ER.data_ptr(),
        "num_experts": num_experts,
        "num_replicas": num_replicas,
        "sent_ids": sent_ids_TK.data_ptr(),
    }
    return extras, sent_ids_TK
