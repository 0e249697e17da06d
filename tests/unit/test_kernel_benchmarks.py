"""The kernel benchmarks check what they time: their references and their checks, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import moe_workload, tune_moe
from benchmarks.moe_workload import Batch, Dims, Layer, check_routing, check_rows
from moe_engine.ops.reference import moe as reference

DIMS = Dims(hidden=64, intermediate=32, num_experts=8, top_k=3)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(moe_workload, "DEVICE", "cpu")


def test_rows_must_be_close_and_finite() -> None:
    expected = torch.randn(5, 64)
    check_rows("right", (1.01 * expected).bfloat16(), expected)
    for wrong in (1.03 * expected, expected.index_fill(0, torch.tensor([3]), float("nan"))):
        with pytest.raises(SystemExit, match="wrong one is wrong"):
            check_rows("wrong one", wrong, expected)


def test_routing_must_be_the_best_experts_once_each_with_their_weights() -> None:
    logits_TE = torch.randn(5, 16)
    ids_TK, weights_TK = reference.route(logits_TE, torch.eye(16), 3, normalize=True)
    check_routing("right", logits_TE, ids_TK, weights_TK)
    twice = torch.cat([ids_TK[:, :1], ids_TK[:, :1], ids_TK[:, 2:]], dim=1)
    for ids, weights in (
        (logits_TE.argsort(dim=1)[:, :3].int(), weights_TK),
        (twice, weights_TK),
        (ids_TK - 100, weights_TK),
        (ids_TK, weights_TK * 1.1),
        (ids_TK, weights_TK * float("nan")),
    ):
        with pytest.raises(SystemExit, match="router is wrong at 5 tokens"):
            check_routing("router", logits_TE, ids, weights)


def test_the_products_references_are_those_of_the_experts() -> None:
    batch = Batch.random(DIMS, Layer.random(DIMS), 21, zipf=True)
    zeros = torch.zeros(63, DIMS.intermediate)
    h_PI, _ = tune_moe.reference_products(batch, zeros)
    _, y_PH = tune_moe.reference_products(batch, h_PI)
    expected_TH = reference.expert_ffn(
        batch.x_TH.float(),
        batch.ids_TK,
        batch.weights_TK,
        batch.layer.gate_up_EJH.float(),
        batch.layer.down_EHI.float(),
    )
    found_TH = reference.sum_choices(y_PH, batch.ids_TK, batch.weights_TK)
    torch.testing.assert_close(found_TH, expected_TH)


def test_a_wrong_candidate_ends_the_tuning_before_it_is_timed(monkeypatch: Any) -> None:
    expected, timed = torch.randn(4, 64), []

    def run(index: int, config: str) -> torch.Tensor:
        timed.append((config, index))
        if config == "too large":
            raise RuntimeError
        return expected if config == "right" else -expected

    def microseconds(calls: Any) -> float:
        timed.clear()
        for call in calls:
            call()
        return 7.0

    monkeypatch.setattr(tune_moe, "microseconds", microseconds)
    times = tune_moe.time_candidates("down", run, expected, ["too large", "right"], 2)
    assert times == {"right": 7.0}
    assert timed == [("right", 0), ("right", 1)]
    with pytest.raises(SystemExit, match="down, wrong, is wrong"):
        tune_moe.time_candidates("down", run, expected, ["right", "wrong"], 2)
    assert timed[-1] == ("wrong", 0), "it was timed"
