"""The exchange's kernels with one rank, for sanitizers, which let no second one run beside it."""

from __future__ import annotations

import torch

from tests.kernels.combine_norm_work import check_normed
from tests.kernels.exchange_work import shape_of
from tests.kernels.virtual_ranks import VirtualRanks, check, random_ranks

MAX_TOKENS, MAX_REDUCED_ROWS = 100, 64
# Hidden size, and whether rows travel in FP8.
EXCHANGE_CASES = [(8, False), (16, False), (2880, False), (4096, False), (512, True), (2560, True)]


def run_exchange(step_tokens: int, hidden: int, fp8: bool) -> None:
    """Dispatch, combine, of few tokens also with a norm, and a sum of as many rows."""
    sizes = {"hidden": hidden, "max_tokens": MAX_TOKENS, "reduced_rows": MAX_REDUCED_ROWS}
    world = VirtualRanks(shape_of(1, fp8=fp8, **sizes))
    ranks = random_ranks(world.shape, "uniform", step_tokens)
    check(world, ranks, step_tokens)
    if step_tokens <= world.shape.packet_tokens:
        check_normed(world, ranks, step_tokens)
    if step_tokens <= MAX_REDUCED_ROWS:
        x_TH = torch.randn(step_tokens, hidden, device="cuda").to(world.shape.dtype)
        assert torch.equal(world.domains[0].all_reduce(x_TH, range(1)), x_TH)
