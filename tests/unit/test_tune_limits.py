"""What becomes of a table's limits by measured step times."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from benchmarks.tune_limits import Timed, best_kernel, by_batch, renewed
from moe_engine.ops.tuning import INF, Steps, pick

BATCHES = (1, 2, 4, 8, 16, 32, 64)
TODAY: Steps[str] = ((16, "a"), (INF, "b"))


def test_a_kernel_replaces_todays_only_if_it_is_faster_by_more_than_noise() -> None:
    step = Timed(1, 512, "a", {"a": 1.0, "b": 0.996, "c": 0.99, "d": 1.01})
    assert best_kernel([step], ["a", "b"]) == "a"
    assert best_kernel([step], ["a", "b", "c", "d"]) == "c"
    assert best_kernel([step], ["d", "a", "b"]) == "b"
    assert best_kernel([step], ["not timed", "a", "d"]) == "a"


def test_the_best_kernel_is_that_of_all_prompts_together() -> None:
    short = Timed(4, 512, "a", {"a": 1.0, "b": 0.97, "c": 0.5})
    long = Timed(4, 8192, "a", {"a": 10.0, "b": 10.5})
    assert best_kernel([short], ["a", "b"]) == "b"
    assert best_kernel([short, long], ["a", "b", "c"]) == "a", "b loses more than it wins"
    faster = Timed(4, 8192, "a", {"a": 10.0, "b": 10.1})
    assert best_kernel([short, faster], ["a", "b", "c"]) == "b"


def test_steps_are_sorted_by_batch() -> None:
    steps = [Timed(batch, input, "a", {"a": 1.0}) for input in (5, 6) for batch in (8, 1)]
    found = by_batch(steps)
    assert list(found) == [1, 8]
    assert [step.input for step in found[8]] == [5, 6]


@pytest.mark.parametrize("limit", [1, 5, 16, 21, 64, 500])
def test_noise_changes_no_limit(limit: float) -> None:
    choose = random.Random(int(limit))
    today: Steps[str] = ((limit, "a"), (INF, "b"))
    for _ in range(20):
        points = []
        for batch in BATCHES:
            step_ms = {kernel: batch * choose.uniform(0.9975, 1.002) for kernel in "ab"}
            step = Timed(batch, 512, pick(today, batch), step_ms)
            points.append((batch, best_kernel([step], [step.present, "a", "b"])))
        assert renewed(today, points) == today


@pytest.mark.parametrize(("best_up_to", "limit"), [(8, 8), (32, 32), (16, 16)])
def test_a_limit_moves_to_the_last_batch_at_which_its_kernel_is_best(
    best_up_to: int, limit: int
) -> None:
    points = [(batch, "a" if batch <= best_up_to else "b") for batch in BATCHES]
    assert renewed(TODAY, points) == ((limit, "a"), (INF, "b"))


def test_a_limit_between_the_same_batches_stays() -> None:
    points = [(batch, "a" if batch <= 16 else "b") for batch in BATCHES]
    for limit in (16, 23, 31):
        today: Steps[str] = ((limit, "a"), (INF, "b"))
        assert renewed(today, points) == today


def test_beyond_the_last_batch_everything_stays() -> None:
    assert renewed(TODAY, [(1, "a"), (8, "a")]) == TODAY
    assert renewed(TODAY, [(1, "a"), (8, "c")]) == ((1, "a"), (16, "c"), (INF, "b"))
    assert renewed(TODAY, [(1, "a"), (64, "a")]) == ((64, "a"), (INF, "b"))
    assert renewed(TODAY, [(16, "b")]) == ((INF, "b"),), "below the first batch as at it"


def test_a_kernel_may_be_best_always_and_another_in_between() -> None:
    assert renewed(TODAY, [(batch, "b") for batch in BATCHES]) == ((INF, "b"),)
    found = renewed(TODAY, [(batch, "c" if batch in (4, 8) else "a") for batch in BATCHES])
    assert found == ((2, "a"), (8, "c"), (64, "a"), (INF, "b"))


@pytest.mark.parametrize("seed", range(50))
def test_what_was_best_at_a_point_is_chosen_there_and_the_rest_stays(seed: int) -> None:
    choose = random.Random(seed)

    def random_steps() -> Steps[str]:
        limits = sorted(choose.sample(range(1, 80), choose.randrange(5)))
        return tuple((limit, choose.choice("abc")) for limit in [*limits, INF])

    today = random_steps()
    amounts = sorted(choose.sample(range(60), choose.randrange(1, 8)))
    points = [(amount, choose.choice("abc")) for amount in amounts]
    found = renewed(today, points)
    limits = [limit for limit, _ in found]
    assert limits == sorted(set(limits))
    assert limits[-1] == INF
    assert all(one != other for (_, one), (_, other) in pairwise(found))
    assert [pick(found, amount) for amount in amounts] == [best for _, best in points]
    limit = next(limit for limit, _ in today if limit >= amounts[-1])
    beyond = range(int(amounts[-1] if limit == INF else limit) + 1, 100)
    assert [pick(found, amount) for amount in beyond] == [pick(today, a) for a in beyond]
