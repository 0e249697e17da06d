"""A TP group's share of the tokens: no expert works on padding, whichever rank has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_engine.config.hf import load_model_config
from moe_engine.dist.communicator import Communicator
from moe_engine.dist.exchange.base import Received
from moe_engine.dist.groups import ParallelGroups
from moe_engine.dist.layout import RankLayout
from moe_engine.layers.context import ForwardContext, LayerContext
from moe_engine.layers.moe import SparseMoE
from moe_engine.layers.norm import RMSNorm
from tests.unit.runner_world import MODEL

NUM_ROWS = 8


class Shares(Communicator):
    """Rank ``rank`` of 3, which gets zeros from the others."""

    def __init__(self, rank: int) -> None:
        self.size, self.rank = 3, rank

    def all_gather_rows(self, x_TH: torch.Tensor, counts: list[int]) -> torch.Tensor:
        first = sum(counts[: self.rank])
        out_TH = x_TH.new_zeros(sum(counts), x_TH.shape[1])
        out_TH[first : first + counts[self.rank]] = x_TH
        return out_TH


class Recording:
    """An exchange whose experts are all here, and which keeps what is sent."""

    shards_tokens = True
    is_capturable = True

    def dispatch(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: Any) -> Received:
        self.ids_TK, self.weights_TK = ids_TK, weights_TK
        return Received(x_TH, ids_TK.clamp(max=0), weights_TK)

    def combine(self, y: Any, received: Received) -> Any:
        return y


@pytest.mark.parametrize("num_tokens", range(NUM_ROWS + 1))
@pytest.mark.parametrize("rank", range(3))
def test_padding_is_sent_to_no_expert(tmp_path: Path, rank: int, num_tokens: int) -> None:
    torch.manual_seed(0)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    model = load_model_config(tmp_path)
    tp = Shares(rank)
    groups = ParallelGroups(RankLayout(rank, 3, 1), tp, Communicator(1, 0))
    context = LayerContext(model, groups, torch.float32, torch.device("cpu"))
    moe, norm = SparseMoE(context), RMSNorm(context, model.hidden_size)
    for parameter in (*moe.parameters(), *norm.parameters()):
        torch.nn.init.normal_(parameter)
    exchange = Recording()
    nothing: Any = None
    step = ForwardContext(
        nothing, nothing, nothing, exchange, torch.tensor([num_tokens], dtype=torch.int32)
    ).with_share(NUM_ROWS, tp)
    x_TH, residual_TH = torch.randn(2, NUM_ROWS, model.hidden_size)
    moe(x_TH, residual_TH, norm, step)
    first, size = [(0, 3), (3, 3), (6, 2)][rank]
    is_token_T1 = (torch.arange(first, first + size) < num_tokens)[:, None]
    assert exchange.ids_TK.shape == (size, model.num_experts_per_tok)
    assert ((exchange.ids_TK >= 0) == is_token_T1).all()
    assert ((exchange.weights_TK != 0) == is_token_T1).all()


def test_without_padding_or_shares_nothing_is_computed() -> None:
    nothing: Any = None
    exchange = Recording()
    step = ForwardContext(nothing, nothing, nothing, exchange)
    assert step.with_share(NUM_ROWS, Shares(1)) is step
    padded = ForwardContext(nothing, nothing, nothing, exchange, torch.tensor([3]))
    assert padded.with_share(NUM_ROWS, Communicator(1, 0)) is padded
    exchange.shards_tokens = False
    assert padded.with_share(NUM_ROWS, Shares(1)) is padded
