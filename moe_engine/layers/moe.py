"""The sparse mixture of experts, sharded over the whole world.

Shape legend: T tokens, H hidden size, E experts, L experts here, I intermediate size, J = 2 × I.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moe_engine.checkpoint.spec import WeightSpec
from moe_engine.dist.exchange import ExpertShard
from moe_engine.layers.context import ForwardContext, LayerContext, share_of_rows
from moe_engine.layers.norm import RMSNorm
from moe_engine.ops.linear import AddedOutput, SplitSums
from moe_engine.ops.moe import MoEOutput, expert_ffn, norm_and_route, route, summed


class SparseMoE(nn.Module):
    """Router, exchange, experts, exchange back."""

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        model = context.model
        self._top_k = model.num_experts_per_tok
        self._normalize = model.norm_topk_prob
        self._tp = context.groups.tp
        self._shard = ExpertShard(model.num_experts, context.groups.ep.size, context.groups.ep.rank)
        num_local, width = self._shard.num_local, model.moe_intermediate_size
        self.router = context.parameter(model.num_experts, model.hidden_size)
        self.gate_up = context.parameter(num_local, 2 * width, model.hidden_size)
        self.down = context.parameter(num_local, model.hidden_size, width)

    def forward(
        self,
        x: torch.Tensor | SplitSums | AddedOutput,
        residual_TH: torch.Tensor,
        norm: RMSNorm,
        step: ForwardContext,
    ) -> tuple[MoEOutput, torch.Tensor]:
        """Add to the residual, normalise, run the experts (a collective over EP).

        Args:
            x: [T, H], what the block before made, what is still to be summed to that, or the
                residual stream that has it already.

        Returns:
            What the experts made, [T, H], perhaps still to be summed, and the residual stream with
            ``x``; the same on every rank of the TP group.
        """
        if not step.exchange.shards_tokens or self._tp.size == 1:
            normed_TH, residual_TH, ids_TK, weights_TK = norm_and_route(
                x,
                residual_TH,
                norm.weight,
                norm.eps,
                self.router,
                self._top_k,
                self._normalize,
                step.num_tokens_1,
            )
            return self._run_experts(normed_TH, ids_TK, weights_TK, step), residual_TH
        normed_TH, residual_TH = norm.after_adding(x, residual_TH)
        first, counts = share_of_rows(len(normed_TH), self._tp)
        share_TH = normed_TH[first : first + counts[self._tp.rank]]
        router = (self.router, self._top_k, self._normalize)
        ids_TK, weights_TK = route(share_TH, *router, step.share_tokens_1)
        out_TH = summed(self._run_experts(share_TH, ids_TK, weights_TK, step))
        return self._tp.all_gather_rows(out_TH, counts), residual_TH

    def _run_experts(
        self,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        step: ForwardContext,
    ) -> MoEOutput:
        """The experts' output for the tokens that this rank brings to the exchange."""
        received = step.exchange.dispatch(x_TH, ids_TK, weights_TK)
        outputs = expert_ffn(
            received.x_RH,
            received.slot_ids_RK,
            received.weights_RK,
            self.gate_up,
            self.down,
            received.num_pairs,
        )
        return step.exchange.combine(outputs, received)

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        """What to read from the checkpoint: the router, and whole tensors of the experts here."""
        yield _whole(f"{prefix}gate.weight", self.router.data)
        width = self.down.shape[2]
        for slot in range(self._shard.num_local):
            expert = f"{prefix}experts.{self._shard.rank * self._shard.num_local + slot}"
            yield _whole(f"{expert}.gate_proj.weight", self.gate_up.data[slot, :width])
            yield _whole(f"{expert}.up_proj.weight", self.gate_up.data[slot, width:])
            yield _whole(f"{expert}.down_proj.weight", self.down.data[slot])


def _whole(name: str, target: torch.Tensor) -> WeightSpec:
    """A spec that reads all of a tensor."""
    return WeightSpec(name, tuple(slice(0, size) for size in target.shape), target)
