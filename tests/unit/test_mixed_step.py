"""Steps of prompts and decodes in static memory give what steps laid out afresh give."""

import random

import pytest
import torch

from moe_engine.engine.batch import StepBatch, build_batch
from moe_engine.engine.graphs import MIXED_SIZES, mixed_buckets
from moe_engine.types.messages import AddRequest
from moe_engine.types.sampling import SamplingParams
from tests.unit.runner_world import RunnerWorld, mixed_requests
from tests.unit.test_decode_step import assert_same_outputs

SIZES = [3, 8, 24]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("with_decode_steps", [False, True])
def test_requests_of_all_kinds_get_the_same_tokens(tmp_path, depth, chunk, with_decode_steps):
    requests = mixed_requests(random.Random(depth), 24)
    options = {"pipeline_depth": depth, "max_prefill_chunk": chunk}
    expected = RunnerWorld(tmp_path, **options).run(requests)
    world = RunnerWorld(tmp_path, with_decode_steps=with_decode_steps, mixed_sizes=SIZES, **options)
    assert_same_outputs(world.run(requests), expected)
    assert 24 in world.runner._mixed_graphs.sizes_run


def test_steps_that_are_too_large_run_without(tmp_path):
    requests = [(list(range(1, 31)), GREEDY), ([5, 6, 7], GREEDY)]
    world = RunnerWorld(tmp_path, mixed_sizes=SIZES)
    assert_same_outputs(world.run(requests), RunnerWorld(tmp_path).run(requests))
    sizes = [sum(num for _, num in step) for step in world.steps]
    assert max(sizes) > 24
    assert len(world.runner._mixed_graphs.sizes_run) == sum(size <= 24 for size in sizes)


def test_preempted_sequences_go_on_where_they_were(tmp_path):
    requests = mixed_requests(random.Random(3), 20)
    few = {"num_blocks": 16, "pipeline_depth": 2}
    world = RunnerWorld(tmp_path, mixed_sizes=SIZES, **few)
    assert_same_outputs(world.run(requests), RunnerWorld(tmp_path).run(requests))
    assert world.scheduler.stats().num_preemptions_total > 0


def test_prompts_that_share_a_prefix_with_decodes(tmp_path):
    """Whose blocks the prefix cache hands out while they are being written and read."""
    prompt = list(range(40, 60))
    requests = [([*prompt, n], GREEDY) for n in range(6)]
    world = RunnerWorld(tmp_path, mixed_sizes=SIZES, max_prefill_chunk=8)
    expected = RunnerWorld(tmp_path, prefix_cache=False).run(requests)
    assert_same_outputs(world.run(requests), expected)
    assert world.scheduler.stats().prefix_hit_tokens_total > 0


def step_of(world: RunnerWorld, requests) -> StepBatch:
    """The first step of these, as the runner lays it out."""
    for number, (prompt, params) in enumerate(requests):
        world.scheduler.add(AddRequest(str(number), prompt, params))
    group = world.scheduler.schedule().groups[0]
    world.runner._update_sequences(group)
    slots = world.runner._table.advance(group.steps)
    return build_batch(world.runner._table, group.steps, slots, [0] * len(group.steps))


@torch.inference_mode()
def test_a_step_leaves_nothing_to_the_next(tmp_path):
    """Whatever the static memory held before: hidden states, keys and values are the same."""
    requests = [([3], GREEDY), ([4, 5, 6, 7, 8, 9], GREEDY), ([1, 2], GREEDY)]
    outputs = []
    for is_dirty in (False, True):
        world = RunnerWorld(tmp_path, mixed_sizes=SIZES)
        mixed, batch = world.runner._mixed_graphs._mixed, step_of(world, requests)
        if is_dirty:  # a full step of other decodes and prompts, in every row and table
            mixed._token_ids_W.fill_(7)
            mixed._positions_W.fill_(9)
            mixed._slots_W.fill_(11)
            mixed._tables_SB.fill_(1)
            mixed._decode_lens_S.fill_(3)
            mixed._numbers.fill_(1)
        mixed.load(batch)
        x_TH = mixed.compute(24, world.runner._exchange.select(24))[:9]
        caches = [world.runner._kv.layer(layer) for layer in range(2)]
        outputs.append([x_TH, *(part[torch.isfinite(part)] for pair in caches for part in pair)])
    for clean, dirty in zip(*outputs, strict=True):
        assert torch.equal(clean, dirty)


@torch.inference_mode()
def test_padding_rows_write_nothing(tmp_path):
    world = RunnerWorld(tmp_path, mixed_sizes=SIZES)
    runner, mixed = world.runner, world.runner._mixed_graphs._mixed
    before = [part.clone() for layer in range(2) for part in runner._kv.layer(layer)]
    mixed.compute(8, runner._exchange.select(8))
    after = [part for layer in range(2) for part in runner._kv.layer(layer)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(1, [16]), (16, [16]), (17, [16, 32]), (100, [16, 32, 64, 128]), (4097, list(MIXED_SIZES))],
)
def test_sizes_hold_every_step_that_they_can(tmp_path, largest, expected):
    exchange = RunnerWorld(tmp_path).runner._exchange
    assert exchange.select(16).is_capturable
    assert mixed_buckets(largest, exchange) == expected
