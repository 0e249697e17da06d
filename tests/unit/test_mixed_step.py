"""Steps of prompts and decodes in static memory give what steps laid out afresh give."""

import random
from types import SimpleNamespace

import pytest
import torch

from moe_engine.engine.batch import StepBatch, build_batch
from moe_engine.engine.decode import Choice
from moe_engine.engine.mixed import (
    FEW_DECODES,
    MIXED_ROWS,
    MixedSize,
    MixedStep,
    make_mixed_step,
    mixed_sizes,
)
from moe_engine.engine.profiling import GRAPH_BYTES_PER_LAYER, StepProfiler
from moe_engine.engine.sweep import StepSweep
from moe_engine.types.messages import AddRequest
from moe_engine.types.sampling import SamplingParams
from tests.unit.runner_world import RunnerWorld, mixed_requests
from tests.unit.test_decode_step import assert_same_outputs

SIZES = [MixedSize(*size) for size in ((3, 3), (8, 2), (8, 8), (24, 4), (24, 9))]
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
    assert set(SIZES[3:]) & set(world.runner._mixed_graphs.sizes_run)


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
        mixed, batch = world.runner._mixed_graphs.mixed, step_of(world, requests)
        if is_dirty:  # a full step of other decodes and prompts, in every row and table
            mixed._token_ids_W.fill_(7)
            mixed._positions_W.fill_(9)
            mixed._slots_W.fill_(11)
            mixed._tables_SB.fill_(1)
            mixed._decode_lens_S.fill_(3)
            mixed._numbers.fill_(1)
        mixed.load(batch)
        # Another length here would be attended to, for nothing.
        assert mixed._decode_lens_S.tolist() == [1] + [0] * 8
        x_TH = mixed.compute(SIZES[-1], world.runner._exchange.select(24))[:9]
        caches = [world.runner._kv.layer(layer) for layer in range(2)]
        outputs.append([x_TH, *(part[torch.isfinite(part)] for pair in caches for part in pair)])
    for clean, dirty in zip(*outputs, strict=True):
        assert torch.equal(clean, dirty)


@torch.inference_mode()
def test_padding_rows_write_nothing(tmp_path):
    world = RunnerWorld(tmp_path, mixed_sizes=SIZES)
    runner, mixed = world.runner, world.runner._mixed_graphs.mixed
    before = [part.clone() for layer in range(2) for part in runner._kv.layer(layer)]
    mixed.compute(SIZES[2], runner._exchange.select(8))
    after = [part for layer in range(2) for part in runner._kv.layer(layer)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


def test_the_smallest_size_that_holds_a_step_is_picked(tmp_path):
    mixed = RunnerWorld(tmp_path, mixed_sizes=SIZES).runner._mixed_graphs.mixed
    picked = {
        (num_tokens, num_decodes): mixed.pick(num_tokens, num_decodes)
        for num_tokens in range(1, 26)
        for num_decodes in range(min(num_tokens, 9) + 1)
    }
    for (num_tokens, num_decodes), size in picked.items():
        holding = [s for s in SIZES if s.num_rows >= num_tokens and s.num_decodes >= num_decodes]
        assert size == min(holding, key=lambda s: (s.num_rows, s.num_decodes), default=None)
    assert picked[3, 3] == SIZES[0]
    assert [picked[4, 2], picked[4, 3]] == SIZES[1:3]
    assert [picked[25, 0], picked[9, 9]] == [None, SIZES[4]]


@pytest.mark.parametrize(
    ("max_tokens", "max_seqs", "expected"),
    [
        (1, 1, [(16, 1)]),
        (16, 100, [(16, 16)]),
        (20, 24, [(16, 16), (32, 16), (32, 24)]),
        (64, 17, [(16, 16), (32, 16), (32, 17), (64, 16), (64, 17)]),
        (
            65,
            65,
            [(16, 16), (32, 16), (32, 32), (64, 16), (64, 64), (128, 16), (128, 65)],
        ),
    ],
)
def test_sizes_hold_every_step_that_there_can_be(tmp_path, max_tokens, max_seqs, expected):
    exchange = RunnerWorld(tmp_path).runner._exchange
    found = mixed_sizes(max_tokens, max_seqs, exchange)
    assert [(size.num_rows, size.num_decodes) for size in found] == expected
    tiers = [(MIXED_ROWS[-1], num) for num in (FEW_DECODES, 256)]
    largest = mixed_sizes(10**6, 256, exchange)[-len(tiers) :]
    assert [(size.num_rows, size.num_decodes) for size in largest] == tiers


def test_sizes_whose_exchange_waits_for_the_device_are_left_out():
    waits = SimpleNamespace(select=lambda num: SimpleNamespace(is_capturable=num <= 64))
    assert {size.num_rows for size in mixed_sizes(4096, 8, waits)} == {16, 32, 64}


def test_other_heads_than_the_kernel_takes_have_no_sizes(tmp_path, monkeypatch):
    runner = RunnerWorld(tmp_path).runner
    parts = runner._model, runner._kv, runner._table, 32, runner._exchange
    assert make_mixed_step(*parts) is None  # on a CPU
    asked = []

    def fits(dtype, num_heads, k_cache_BLGD):
        asked.append((dtype, num_heads, k_cache_BLGD.shape[2:]))
        return True

    monkeypatch.setattr("moe_engine.engine.mixed.takes", fits)
    assert make_mixed_step(*parts).sizes == mixed_sizes(32, 9, runner._exchange)
    assert asked == [(torch.float32, 4, (2, 16))]


def test_all_sizes_are_measured_and_compiled(tmp_path, monkeypatch):
    """By the profiler only the largest in full; the ledger has a graph for each size."""
    monkeypatch.setattr("moe_engine.engine.mixed.takes", lambda *_: True)
    world = RunnerWorld(tmp_path)
    runtime, run, warmed = world.runtime, [], []
    hidden_states = MixedStep._hidden_states

    def record(mixed, model, size, exchange):
        (run if model is world.runner._model else warmed).append(size)
        return hidden_states(mixed, model, size, exchange)

    monkeypatch.setattr(MixedStep, "_hidden_states", record)
    sizes = mixed_sizes(32, 9, world.runner._exchange)
    parts = (
        runtime.config, runtime.model_config, world.runner._model, world.runner._kv,
        runtime.groups, runtime.exchange, runtime.max_model_len, runtime.device,
    )  # fmt: skip
    with torch.inference_mode():
        StepSweep(*parts, with_graphs=False)()
        assert not warmed
        StepSweep(*parts, with_graphs=True)()
    assert warmed == sizes[::-1]
    assert not run
    warmed.clear()
    profiler = StepProfiler(*parts)
    monkeypatch.setattr(profiler, "_reserved_by", lambda work: (work(), 1000)[1])
    prefills = []
    monkeypatch.setattr(profiler, "_run_prefill", prefills.append)
    with_mixed = profiler.measure(with_graphs=True)
    assert not prefills, "no step is launched singly"
    assert warmed == sizes[::-1], "before, so that what stays is not counted"
    assert run == sizes[-1:]
    monkeypatch.setattr("moe_engine.engine.mixed.takes", lambda *_: False)
    without = profiler.measure(with_graphs=True)
    assert prefills == [32, 8, 2, 32], "all of them, and the largest once more to be measured"
    num_layers = runtime.model_config.num_hidden_layers + len(Choice)
    more = len(sizes) * num_layers * GRAPH_BYTES_PER_LAYER
    assert with_mixed.graphs - without.graphs == more
