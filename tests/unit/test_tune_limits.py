"""Limits and tiles from measured step times."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from benchmarks.tune_limits import Timed, best_limits, renewed_tiles
from moe_engine.ops.tuning import ExpertChoices

INF = math.inf
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def steps(
    present: Callable[[int], str], times: Callable[[int], dict[str, float]], *, input: int = 512
) -> list[Timed]:
    """Steps of all `BATCHES`."""
    return [Timed(batch, input, present(batch), times(batch)) for batch in BATCHES]


def fused_up_to(most: int) -> Callable[[int], str]:
    return lambda batch: "fused" if batch <= most else "separate"


def test_a_difference_within_the_margin_costs_as_much_as_today() -> None:
    step = Timed(1, 512, "a", {"a": 1.0, "b": 0.996, "c": 0.99, "d": 1.01})
    assert [step.cost(kernel) for kernel in "abcd"] == [1.0, 1.0, 0.99, 1.01]
    assert step.cost("not timed") == INF
    assert step.best(["a", "b"]) == "a"
    assert step.best(["not timed", "b", "a", "d"]) == "b"
    assert step.best(["a", "b", "c"]) == "c"


def test_a_limit_moves_to_the_last_batch_at_which_its_kernel_is_best() -> None:
    timed = steps(fused_up_to(16), lambda batch: {"fused": 1 + batch / 8, "separate": 2.0})
    assert best_limits(timed, ("fused", "separate"), [16])[0] == [8]
    timed = steps(fused_up_to(16), lambda batch: {"fused": 1 + batch / 40, "separate": 2.0})
    assert best_limits(timed, ("fused", "separate"), [16])[0] == [32]


@pytest.mark.parametrize(("fused", "limit"), [(0.5, 64), (3.0, 0)])
def test_a_kernel_may_be_best_always_or_never(fused: float, limit: int) -> None:
    timed = steps(fused_up_to(16), lambda batch: {"fused": fused, "separate": 2.0})
    assert best_limits(timed, ("fused", "separate"), [16])[0] == [limit]


@pytest.mark.parametrize("present", [1, 5, 16, 21, 64, 500])
def test_noise_changes_no_limit(present: int) -> None:
    choose = random.Random(present)
    for _ in range(20):
        timed = steps(
            fused_up_to(present),
            lambda batch: {
                "fused": batch * choose.uniform(0.9975, 1.002),
                "separate": batch * choose.uniform(0.9975, 1.002),
            },
        )
        limits, cost = best_limits(timed, ("fused", "separate"), [present])
        assert limits == [present]
        assert cost == len(BATCHES)


def test_one_step_that_is_slower_by_noise_does_not_end_a_kernels_reign() -> None:
    timed = steps(
        fused_up_to(16),
        lambda batch: {"fused": 2.02 if batch == 2 else 1.8, "separate": 2.0},
    )
    assert best_limits(timed, ("fused", "separate"), [16])[0] == [64]


def test_three_kernels_have_two_limits_and_one_may_lack_some_steps() -> None:
    def present(batch: int) -> str:
        return "a" if batch <= 16 else "b" if batch <= 32 else "c"

    def times(batch: int) -> dict[str, float]:
        found = {"a": 1 + batch / 10, "b": 2.0, "c": 0.9 + batch / 8}
        return {k: ms for k, ms in found.items() if k != "a" or batch <= 16}

    # a is best up to 8 (at 1 and 2 c is, which is not told from b's end), then b, and c never.
    assert best_limits(steps(present, times), ("a", "b", "c"), [16, 32])[0] == [8, 64]
    # Today's limit holds where it lies between the same batch sizes.
    assert best_limits(steps(present, times), ("a", "b", "c"), [11, 64])[0] == [11, 64]


def test_steps_of_all_inputs_decide_together() -> None:
    def present(batch: int) -> str:
        return "a" if batch <= 2 else "b"

    short = steps(present, lambda batch: {"a": 0.98, "b": 1.0})
    long = steps(present, lambda batch: {"a": 0.9 if batch <= 2 else 1.1, "b": 1.0}, input=8192)
    assert best_limits(short, ("a", "b"), [2])[0] == [64]
    assert best_limits([*short, *long], ("a", "b"), [2])[0] == [2]


def test_tiles_stay_where_they_are_best_and_change_at_a_point_where_not() -> None:
    present = ((0.25, 16), (40.0, 64), (INF, 256))
    same = [(0.0625, 16), (0.25, 16), (0.5, 64), (16.0, 64)]
    assert renewed_tiles(same, present) == present
    smaller = [(0.25, 16), (0.5, 32), (4.0, 32), (8.0, 64), (16.0, 64)]
    assert renewed_tiles(smaller, present) == ((0.25, 16), (4.0, 32), (40.0, 64), (INF, 256))
    to_the_end = [(0.25, 16), (0.5, 64), (16.0, 128)]
    assert renewed_tiles(to_the_end, present) == (
        (0.25, 16),
        (0.5, 64),
        (16.0, 128),
        (40.0, 64),
        (INF, 256),
    )
    for tiles in (smaller, to_the_end):
        ExpertChoices(tiles=renewed_tiles(tiles, present))  # which checks them
    assert renewed_tiles([(1.0, 16)], ((INF, 64),)) == ((1.0, 16), (INF, 64))
