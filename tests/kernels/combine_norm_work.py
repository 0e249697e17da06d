"""A combine with the residual addition and the norm that follows, and what must come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_engine.dist.exchange.domain import ExchangeShape
from moe_engine.ops.moe import MoEOutput
from moe_engine.ops.norm import PendingRows
from moe_engine.ops.reference import norm as reference
from moe_engine.ops.reference.exchange import Tokens
from tests.kernels.exchange_work import expected_outputs, scaling_experts
from tests.kernels.virtual_ranks import VirtualRanks

EPS = 1e-6
# Sums of squares in another order may round a row's root, and with it both that is rounded then,
# to a neighbour; in float32 the roots themselves differ by more.
ULPS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 8}


@dataclass(frozen=True)
class NextNorms:
    """Of each rank, the norm that follows a combine; a `Finish`."""

    residuals: list[torch.Tensor]
    weight_H: torch.Tensor

    def __call__(self, rank: int, combined: MoEOutput) -> tuple[torch.Tensor, torch.Tensor]:
        """Both in one launch."""
        assert isinstance(combined, PendingRows)
        return combined.add_rms_norm(self.residuals[rank], self.weight_H, EPS)

    def check(
        self, found: Sequence[tuple[torch.Tensor, torch.Tensor]], combined: Sequence[torch.Tensor]
    ) -> None:
        """The new residual streams have the reference's bits, the norms are next to them."""
        for (normed, stream), out_TH, residual in zip(found, combined, self.residuals, strict=True):
            right, right_stream = reference.add_rms_norm(out_TH, residual, self.weight_H, EPS)
            assert torch.equal(stream, right_stream), (stream - right_stream).abs().max()
            rtol = ULPS[normed.dtype] * torch.finfo(normed.dtype).eps
            torch.testing.assert_close(normed, right, rtol=rtol, atol=2**-23)


def random_norms(shape: ExchangeShape, ranks: Sequence[Tokens]) -> NextNorms:
    """For the tokens that each rank brings."""
    rows = [torch.randn(len(tokens.x_TH), shape.hidden) for tokens in ranks]
    weight_H = torch.rand(shape.hidden) + 0.5
    return NextNorms(
        [row.to(device="cuda", dtype=shape.dtype) for row in rows],
        weight_H.to(device="cuda", dtype=shape.dtype),
    )


def check_normed(world: VirtualRanks, ranks: list[Tokens], step_tokens: int) -> None:
    """Exchange once, with the norm."""
    shape = world.shape
    factors_E = torch.randn(shape.num_experts, device="cuda")
    experts = [scaling_experts(shape, rank, factors_E) for rank in range(shape.num_ranks)]
    norms = random_norms(shape, ranks)
    torch.cuda.synchronize()
    _, found = world.exchange(ranks, step_tokens, experts, finish=norms)
    world.finish()
    _, combined = expected_outputs(shape, ranks, step_tokens, experts)
    norms.check(found, combined)
