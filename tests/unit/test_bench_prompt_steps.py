"""The benchmark of steps with prompts, on a CPU, whose steps in static memory stand for graphs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_prompt_steps
from benchmarks.decode_bench import DecodeBench
from moe_engine.engine.mixed import MixedSize
from tests.unit.runner_world import MODEL, mix_in_static_memory

SIZES = [MixedSize(8, 4), MixedSize(64, 7)]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DecodeBench:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    event = SimpleNamespace(record=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: event)
    monkeypatch.setattr(bench_prompt_steps, "NUM_INPUT", 6)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    bench = DecodeBench({"device": "cpu"}, str(tmp_path), [(7, 20)], 8)
    mix_in_static_memory(bench.runtime.runner, SIZES)
    return bench


@pytest.mark.parametrize(
    ("num_decodes", "prompts", "size"), [(0, (1, 5), 0), (3, (1, 5), 0), (4, (3, 20), 1)]
)
def test_a_step_runs_both_ways_and_can_run_again(
    bench: DecodeBench, num_decodes: int, prompts: tuple[int, int], size: int
) -> None:
    plan = bench.repeatable_prompts(num_decodes, 6, *prompts)
    lengths = sorted(step.num_tokens for step in plan.groups[0].steps)
    assert lengths == [1] * num_decodes + [prompts[1]] * prompts[0]
    runner = bench.runtime.runner
    replayed = [bench.hidden_states(plan) for _ in range(2)]
    assert runner._mixed_graphs.sizes_run[-2:] == [SIZES[size]] * 2
    runner._mixed_graphs = None
    singly = bench.hidden_states(plan)
    assert torch.equal(*replayed)
    torch.testing.assert_close(replayed[0], singly)


def test_it_measures_both_ways(bench: DecodeBench) -> None:
    row = bench_prompt_steps.measure(bench, 3, 2, 4)
    assert (row["decodes"], row["prompts"], row["tokens"]) == (3, 2, 4)
    for way in ("engine", "launched"):
        assert 0 < row[way]["host_ms"] <= row[way]["ms"]
    runs = bench_prompt_steps.NUM_REPEATS + 1
    assert bench.runtime.runner._mixed_graphs.sizes_run[-runs:] == [SIZES[1]] * runs


def test_a_way_that_computes_something_else_ends_it(bench: DecodeBench) -> None:
    mixed = bench.runtime.runner._mixed_graphs.mixed
    compute = mixed.compute
    mixed.compute = lambda *args: torch.randn_like(compute(*args))
    with pytest.raises(SystemExit, match=r"2x4 beside 3: off by 1\.\d\d"):
        bench_prompt_steps.measure(bench, 3, 2, 4)
