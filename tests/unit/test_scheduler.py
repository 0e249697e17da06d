"""What the scheduler does in chosen situations; `test_scheduler_properties` covers the others."""

from __future__ import annotations

import pytest

from moe_engine.engine.seeding import uniform
from moe_engine.types.messages import AddRequest
from moe_engine.types.results import FinishReason
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import GroupPlan, PromptLogprobs, StepResult
from tests.unit.scheduler_world import EOS, World


def shape(plan) -> list[list[tuple[int, int, int]]]:
    """(seq_id, start, num_tokens) of every step of every group."""
    return [[(s.seq_id, s.start, s.num_tokens) for s in group.steps] for group in plan.groups]


# The order within a step


def test_a_step_holds_decodes_then_chunks_then_new_requests():
    world = World(max_num_batched_tokens=8, num_blocks=32, prefix_cache=False)
    world.add([1, 2], max_tokens=9)
    world.step()
    world.add([1] * 11, max_tokens=9)
    world.step()
    world.add([2] * 9, max_tokens=9)
    assert shape(world.step()) == [[(0, 3, 1), (1, 7, 4), (2, 0, 3)]]
    assert shape(world.step()) == [[(0, 4, 1), (1, 11, 1), (2, 3, 6)]]
    world.drain()


def test_chunks_are_limited_by_max_prefill_chunk():
    world = World(max_prefill_chunk=3, prefix_cache=False)
    world.add([1] * 7, max_tokens=2)
    chunks = [shape(world.step())[0][0] for _ in range(4)]
    assert chunks == [(0, 0, 3), (0, 3, 3), (0, 6, 1), (0, 7, 1)]


def test_a_sample_is_drawn_only_at_the_end_of_the_prompt_and_indexed_by_output_position():
    world = World(max_prefill_chunk=3)
    world.add([1] * 4, max_tokens=3, seed=99)
    numbers = [world.step().groups[0].steps[0].uniform for _ in range(4)]
    assert numbers == [None, uniform(99, 0), uniform(99, 1), uniform(99, 2)]


def test_prompt_logprobs_arrive_chunk_by_chunk():
    world = World(max_prefill_chunk=2)
    client = world.add([1, 2, 3, 4, 5], max_tokens=1, prompt_logprobs=0)
    known = []
    while not client.is_finished:
        world.step()
        known.append(len(client.prompt_logprobs))
    assert known == [2, 4, 4]


def test_requests_without_a_seed_draw_different_numbers():
    world = World()
    for _ in range(2):
        world.add([1, 2, 3], max_tokens=1)
    first, second = world.step().groups[0].steps
    assert first.uniform != second.uniform


def test_max_num_seqs_bounds_each_group():
    world = World(max_num_seqs=2, num_groups=2)
    for _ in range(5):
        world.add([1, 2], max_tokens=2)
    assert [len(group.steps) for group in world.step().groups] == [2, 2]
    assert world.scheduler.stats().num_waiting == 1
    world.drain()


def test_nobody_overtakes_the_head_of_the_queue():
    world = World(num_blocks=4)
    world.add([1] * 8, max_tokens=4)
    world.step()
    large = world.add([2] * 9, max_tokens=1)
    small = world.add([3], max_tokens=1)
    while not large.token_ids:
        assert not small.token_ids
        world.step()
    world.drain()


# Groups


def test_requests_spread_over_groups_by_load():
    world = World(num_groups=3)
    for token in (1, 2, 3):
        world.add([token] * 5, max_tokens=4)
    assert [len(group.steps) for group in world.step().groups] == [1, 1, 1]
    world.drain()


def test_idle_groups_get_an_empty_plan():
    world = World(num_groups=2)
    world.add([1, 2], max_tokens=2)
    assert world.step().groups[1] == GroupPlan()


def test_a_request_goes_where_its_prefix_is_cached():
    world = World(num_groups=2, max_num_batched_tokens=32)
    world.add([1] * 5, max_tokens=1)
    world.add([2] * 30, max_tokens=1)
    assert [len(group.steps) for group in world.step().groups] == [1, 1]
    world.add([2] * 30, max_tokens=1)
    assert shape(world.step()) == [[], [(2, 28, 2)]]


def test_load_outweighs_a_short_cached_prefix():
    world = World(num_groups=2)
    world.add([1] * 9, max_tokens=12)
    world.step()
    world.add([1] * 9, max_tokens=2)
    assert [len(group.admitted) for group in world.step().groups] == [0, 1]


def test_a_group_with_prompts_left_to_compute_is_avoided():
    world = World(num_groups=2, max_prefill_chunk=4)
    world.add([1] * 28, max_tokens=2)
    world.add([2] * 4, max_tokens=9)
    world.step()
    world.add([3] * 4, max_tokens=2)
    assert [len(group.admitted) for group in world.step().groups] == [0, 1]


def test_a_request_goes_to_another_group_when_the_preferred_one_is_full():
    world = World(num_groups=2, max_num_seqs=1, max_num_batched_tokens=32)
    world.add([1] * 25, max_tokens=7)
    world.step()
    world.add([1] * 25, max_tokens=7)
    assert [len(group.admitted) for group in world.step().groups] == [0, 1]


# Pipelining


def test_depth_one_plans_nothing_while_a_step_is_in_flight():
    world = World()
    world.add([1, 2], max_tokens=4)
    world.schedule()
    assert world.schedule() is None
    world.complete()
    assert world.schedule() is not None


def test_depth_two_decodes_a_token_that_only_the_device_knows():
    world = World(pipeline_depth=2)
    client = world.add([1, 2, 3], max_tokens=4)
    assert shape(world.schedule()) == [[(0, 0, 3)]]
    assert shape(world.schedule()) == [[(0, 3, 1)]]
    assert world.schedule() is None
    assert client.token_ids == []
    world.complete()
    assert shape(world.schedule()) == [[(0, 4, 1)]]
    world.drain()


def test_no_step_is_planned_beyond_max_tokens():
    world = World(pipeline_depth=2)
    world.add([1, 2, 3], max_tokens=1)
    world.schedule()
    assert world.schedule() is None


def find_stopping_prompt(world: World) -> list[int]:
    """A prompt whose second output token ends it."""
    for token in range(1000):
        prompt = [1, 1, 1, token]
        params = SamplingParams(ignore_eos=False, max_tokens=9, seed=5)
        client = World().add(prompt, params)
        if len(client.expected) == 2:
            return prompt
    raise AssertionError("no prompt stops")


def test_an_overrun_is_ignored_and_its_blocks_serve_the_next_step():
    world = World(pipeline_depth=2, num_blocks=2, max_num_seqs=1)
    prompt = find_stopping_prompt(world)
    client = world.add(prompt, ignore_eos=False, max_tokens=5, seed=5)
    world.schedule()
    world.schedule()
    world.complete()
    world.schedule()
    [update] = world.complete()
    assert (update.token_ids, update.finish_reason) == ([EOS], FinishReason.STOP)
    assert update.stop_token_id is None
    assert world.scheduler.num_in_flight == 1
    world.add([2] * 7, max_tokens=1)
    plan = world.schedule()
    assert plan.groups[0].retired == [0]
    assert len(plan.groups[0].steps[0].new_blocks) == 2
    assert world.complete() == []
    world.drain()
    assert client.token_ids == client.expected


def test_user_stop_tokens_are_named_in_the_last_update():
    world = World()
    client = world.add([1, 2], stop_token_ids=tuple(range(1, 7)), max_tokens=30)
    world.drain()
    assert client.last.stop_token_id == client.token_ids[-1]
    assert client.last.finish_reason is FinishReason.STOP


def test_retirements_alone_make_no_plan_and_go_with_the_next_one():
    world = World(num_groups=2)
    world.add([1, 2], max_tokens=1)
    world.step()
    assert world.schedule() is None
    world.add([3] * 4, max_tokens=1)
    world.add([4] * 4, max_tokens=1)
    plan = world.schedule()
    assert plan.groups[0].retired == [0]
    assert plan.step_id == 1


# Aborts


def test_abort_ends_a_waiting_request():
    world = World()
    client = world.add([1, 2])
    world.abort(client)
    assert client.is_finished
    assert world.schedule() is None


def test_abort_drops_the_result_in_flight_and_frees_the_blocks():
    world = World()
    client = world.add([1, 2], prompt_logprobs=0)
    world.schedule()
    world.abort(client)
    world.check()
    assert world.scheduler.stats().num_free_blocks == 16
    assert world.complete() == []
    assert client.token_ids == []


def test_abort_of_unknown_or_finished_requests_says_nothing():
    world = World()
    assert world.scheduler.abort("nobody") is None
    client = world.add([1, 2], max_tokens=1)
    world.drain()
    assert world.scheduler.abort(client.request.request_id) is None


# Results and statistics


def test_results_that_do_not_match_the_plan_are_caught():
    world = World(num_groups=2)
    with pytest.raises(AssertionError, match="no step is in flight"):
        world.scheduler.complete([])

    def answer(*results: StepResult) -> None:
        world = World(num_groups=2)
        world.add([1, 2], max_tokens=1)
        world.schedule()
        world.scheduler.complete(list(results))

    with pytest.raises(AssertionError, match=r"ran on DP groups \[0\]"):
        answer()
    with pytest.raises(AssertionError, match=r"came from \[0, 0\]"):
        answer(StepResult(0, 0), StepResult(0, 0))
    with pytest.raises(AssertionError, match="step 0 is due"):
        answer(StepResult(1, 0))
    with pytest.raises(AssertionError, match=r"samples sequences \[0\]"):
        answer(StepResult(0, 0))
    plan = world.add([1, 2], max_tokens=1) and world.schedule()
    [result] = world.results[0]
    stray = PromptLogprobs(plan.groups[0].steps[0].seq_id + 1, 1, [])
    with pytest.raises(AssertionError, match="not in step 0"):
        world.scheduler.complete([StepResult(0, 0, result.tokens, [stray])])


def test_stats_follow_the_life_of_requests():
    world = World(num_groups=2, num_blocks=6, max_num_seqs=1)
    assert world.scheduler.stats().num_blocks == world.scheduler.stats().num_free_blocks == 12
    for _ in range(3):
        world.add([1] * 5, max_tokens=2)
    world.step()
    stats = world.scheduler.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_free_blocks) == (1, 2, 8)
    assert (stats.prompt_tokens_total, stats.generation_tokens_total) == (10, 2)
    world.drain()
    stats = world.scheduler.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_free_blocks) == (0, 0, 12)
    assert (stats.num_steps_total, stats.prompt_tokens_total) == (4, 15)
    assert (stats.generation_tokens_total, stats.num_preemptions_total) == (6, 0)


def test_check_idle_finds_a_leaked_block():
    world = World()
    world.scheduler._groups[0].pool.allocate(1)
    with pytest.raises(AssertionError, match="references"):
        world.scheduler.check_idle()


def test_requests_keep_their_own_token_list():
    world = World()
    tokens = [1, 2, 3]
    world.scheduler.add(AddRequest("x", tokens, SamplingParams(max_tokens=2)))
    tokens.append(4)
    assert world.scheduler.schedule().groups[0].admitted[0].token_ids == [1, 2, 3]
