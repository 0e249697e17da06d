"""Experts over many ranks of one process give what they give in one place."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moe_engine.types.sampling import SamplingParams
from tests.e2e.virtual_world import VirtualWorld
from tests.unit.runner_world import LIMITS, MODEL, RunnerWorld, decode_in_static_memory


def requests_of(seed: int, number: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 30 tokens, greedy, with outputs of 1 to 20."""
    choose = random.Random(seed)
    return [
        (
            [choose.randrange(90) for _ in range(choose.randint(1, 30))],
            SamplingParams(temperature=0.0, max_tokens=choose.randint(1, 20), ignore_eos=True),
        )
        for _ in range(number)
    ]


@pytest.mark.parametrize("with_decode_steps", [False, True])
@pytest.mark.parametrize(("num_ranks", "tp"), [(2, 1), (8, 1), (2, 2), (4, 2)])
def test_threads_with_a_share_of_the_experts_agree_with_one_rank(
    tmp_path: Path, num_ranks: int, tp: int, with_decode_steps: bool
) -> None:
    options = LIMITS | {"device": "cpu", "dtype": "float32"}
    world = VirtualWorld(tmp_path, num_ranks, MODEL, tp=tp, **options)
    if with_decode_steps:
        for rank in world.ranks:
            decode_in_static_memory(rank.runner)
    # In the end one of the groups after the other has nothing to do.
    requests = requests_of(num_ranks, 20)
    found = [token_ids for token_ids, _, _ in world.run(requests)]
    (alone := tmp_path / "alone").mkdir()
    expected = RunnerWorld(alone, dtype="float32").run(requests)
    assert found == [tokens for tokens, _, _ in expected]
    if with_decode_steps:
        sizes = [rank.runner._graphs.sizes_run for rank in world.ranks]
        assert sizes[0]
        assert all(of_rank == sizes[0] for of_rank in sizes), "the same graph on every rank"
