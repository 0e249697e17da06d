"""Which implementation of the experts runs, by the tables and the pairs that are expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_engine.ops import hopper, moe, tuning
from moe_engine.ops.tuning import INF, ExpertChoices
from tests.unit.hopper_on_cpu import choose_as_on_hopper, zeros


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> tuning.Table:
    """The CPU's, to fill."""
    return choose_as_on_hopper(monkeypatch)


def test_experts_follow_their_table(table: tuning.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up_EJH, down_EHI = zeros(8, 128, 64), zeros(8, 64, 64)
    tiles: list[int] = []

    def grouped(*arguments: Any) -> torch.Tensor:
        tiles.append(arguments[-1])
        return zeros(0)

    monkeypatch.setattr(hopper, "sorts_pairs", lambda *arguments: True)
    monkeypatch.setattr(hopper, "grouped_expert_ffn", grouped)
    monkeypatch.setattr(hopper, "streaming_expert_ffn", lambda *arguments: tiles.append(0))
    monkeypatch.setitem(moe.EXPERT_FFNS, "triton", lambda *arguments: tiles.append(-1))

    def run(num_rows: int) -> int:
        ids_RK = torch.zeros(num_rows, 2, dtype=torch.int32)
        moe.expert_ffn(zeros(num_rows, 64), ids_RK, ids_RK.float(), gate_up_EJH, down_EHI)
        return tiles[-1]

    assert [run(rows) for rows in (2, 3, 160, 161)] == [0, 64, 64, 128]
    steps = ((6, "streaming"), (INF, "grouped"))
    table[ExpertChoices, (64, 64, 8, 2)] = ExpertChoices(steps, ((2, 32), (INF, 16)))
    assert [run(rows) for rows in (6, 7, 8, 9)] == [0, 32, 32, 16]
    steps = ((6, "streaming"), (7, "triton"), (INF, "grouped"))
    table[ExpertChoices, (64, 64, 8, 2)] = ExpertChoices(steps, ((INF, 16),))
    assert [run(rows) for rows in (6, 7, 8)] == [0, -1, 16]


@pytest.mark.parametrize("sorts", [False, True])
def test_pairs_that_the_experts_do_not_sort_are_sorted_before(
    table: tuning.Table, monkeypatch: pytest.MonkeyPatch, sorts: bool
) -> None:
    seen: list[Any] = []

    def grouped(x_RH: torch.Tensor, ids_RK: torch.Tensor, groups: Any, *rest: Any) -> torch.Tensor:
        seen.append((ids_RK, groups))
        return zeros(0)

    monkeypatch.setattr(hopper, "sorts_pairs", lambda *arguments: sorts)
    monkeypatch.setattr(hopper, "grouped_expert_ffn", grouped)
    ids_RK = torch.tensor([[2, 0], [-1, 2], [3, 1], [0, 1], [1, 3]])
    weights = zeros(4, 128, 64), zeros(4, 64, 64)
    moe.expert_ffn(zeros(5, 64), ids_RK, ids_RK.float(), *weights)
    [(given_RK, groups)] = seen
    assert given_RK.dtype == torch.int32
    assert torch.equal(given_RK.long(), ids_RK)
    if sorts:
        assert groups is None
    else:
        offsets_E1, pairs_P = groups
        assert offsets_E1.tolist() == [0, 2, 5, 7, 9]
        assert pairs_P[:9].tolist() == [1, 6, 5, 7, 8, 0, 3, 4, 9]


def test_the_choice_goes_by_the_pairs_that_are_expected(
    table: tuning.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of slots for the tokens of many ranks most are empty."""
    tiles: list[int] = []
    monkeypatch.setattr(hopper, "sorts_pairs", lambda *arguments: True)
    monkeypatch.setattr(hopper, "takes_streaming_experts", lambda *arguments: True)
    monkeypatch.setattr(
        hopper, "grouped_expert_ffn", lambda *arguments: (tiles.append(arguments[-1]), zeros(0))[1]
    )
    monkeypatch.setattr(hopper, "streaming_expert_ffn", lambda *arguments: tiles.append(0))
    steps = ((2, "streaming"), (INF, "grouped"))
    table[ExpertChoices, (64, 64, 8, 2)] = ExpertChoices(steps, ((2, 32), (INF, 64)))
    ids_RK = torch.zeros(40, 2, dtype=torch.int32)
    for expected_pairs in (None, 80, 16, 5, 4, 1):
        moe.expert_ffn(
            zeros(40, 64),
            ids_RK,
            ids_RK.float(),
            zeros(8, 128, 64),
            zeros(8, 64, 64),
            expected_pairs,
        )
    assert tiles == [64, 64, 32, 32, 0, 0]
