"""The exchange's kernels in whole models: eight ranks that share a GPU, against one alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_engine.errors import ExchangeTimeout
from moe_engine.types.messages import AddRequest
from moe_engine.types.sampling import SamplingParams
from tests.e2e.test_virtual_world import requests_of
from tests.e2e.virtual_world import VirtualWorld, waiting_for_own_streams
from tests.unit.runner_world import LIMITS, MODEL, RunnerWorld

pytestmark = pytest.mark.usefixtures("needs_hopper")

NUM_RANKS = 8
ON_GPU = LIMITS | {"device": "cuda", "exchange": "nvlink"}
DIMENSIONS = Path(__file__).parents[2] / "benchmarks" / "models" / "qwen3-30b-a3b" / "config.json"


@pytest.fixture(autouse=True)
def own_streams() -> Iterator[None]:
    with waiting_for_own_streams():
        yield


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(("num_ranks", "tp"), [(8, 1), (8, 4), (4, 4), (2, 2)])
def test_tokens_in_float32_are_those_of_one_rank(
    tmp_path: Path, num_ranks: int, tp: int, cuda_graphs: bool
) -> None:
    """Also of the flagship's layout, TP 4 x DP 2, and of TP alone, where few tokens stay."""
    options = {"dtype": "float32", "cuda_graphs": cuda_graphs}
    world = VirtualWorld(tmp_path, num_ranks, MODEL, tp=tp, **ON_GPU | options)
    requests = requests_of(3, 30)
    world.rehearse(requests)
    found = [token_ids for token_ids, _, _ in world.run(requests)]
    (alone := tmp_path / "alone").mkdir()
    one = RunnerWorld(alone, device="cuda", **options)
    assert found == [token_ids for token_ids, _, _ in one.run(requests)]


def test_logits_in_bfloat16_are_as_good_as_those_of_one_rank(tmp_path: Path) -> None:
    """Of Qwen3-30B-A3B's dimensions, with few layers and a small vocabulary."""
    model = json.loads(DIMENSIONS.read_text()) | {"num_hidden_layers": 3, "vocab_size": 2048}
    model |= {"bos_token_id": None, "eos_token_id": None}
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "block_size": 16}
    limits |= {"num_blocks": 200, "max_model_len": 400}
    scored = SamplingParams(temperature=0.0, max_tokens=8, prompt_logprobs=0, ignore_eos=True)
    torch.manual_seed(0)
    requests = [(torch.randint(0, 2000, (n,)).tolist(), scored) for n in (1, 17, 64, 200, 333) * 4]

    def scores(outputs: list[Any]) -> torch.Tensor:
        return torch.tensor(
            [entry.logprob for _, _, prompt in outputs for entry in prompt if entry]
        )

    def alone(dtype: str) -> torch.Tensor:
        (directory := tmp_path / dtype).mkdir()
        world = RunnerWorld(directory, model=model, **limits | {"device": "cuda", "dtype": dtype})
        return scores(world.run(requests))

    expected, rounded = alone("float32"), alone("bfloat16")
    options = ON_GPU | limits | {"dtype": "bfloat16"}
    found = scores(VirtualWorld(tmp_path, NUM_RANKS, model, **options).run(requests))
    assert len(found) == len(expected) > 2000
    error, usual = ((values - expected).square().mean().sqrt() for values in (found, rounded))
    print(f"root mean square of the error: {error:.4f} on {NUM_RANKS} ranks, {usual:.4f} on one")
    assert error <= 1.2 * usual


def test_a_rank_that_leaves_a_step_out_is_named(tmp_path: Path) -> None:
    options = {"dtype": "bfloat16", "exchange_timeout": 3.0}
    world = VirtualWorld(tmp_path, NUM_RANKS, MODEL, **ON_GPU | options)
    world.run(requests_of(4, 10))
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    for number in range(NUM_RANKS):
        world.scheduler.add(AddRequest(f"late {number}", [1, 2, 3], params))
    plan = world.scheduler.schedule()
    assert plan is not None
    runner = world.ranks[5].runner
    launch, runner.launch = runner.launch, lambda _: None  # type: ignore[assignment, method-assign]
    pending = world.launch(plan)
    runner.launch = launch  # type: ignore[method-assign]
    for rank, step in enumerate(pending):
        if rank == 5:
            continue
        with pytest.raises(ExchangeTimeout, match="rank 5 has sent nothing"):
            step.result()
