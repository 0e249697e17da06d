"""What the scheduler does in chosen situations; `test_scheduler_properties` covers the others."""

from __future__ import annotations

import pytest

from moe_engine.engine.seeding import uniform
from moe_engine.errors import InvalidRequestError
from moe_engine.types.messages import AddRequest
from moe_engine.types.results import FinishReason
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import GroupPlan, PromptLogprobs, StepResult
from tests.unit.scheduler_world import EOS, World


def shape(plan) -> list[list[tuple[int, int, int]]]:
    """(seq_id, start, num_tokens) of every step of every group."""
    return [[(s.seq_id, s.start, s.num_tokens) for s in group.steps] for group in plan.groups]


# Refusals


@pytest.mark.parametrize(
    ("num_prompt_tokens", "params", "num_blocks", "param", "code", "words"),
    [
        (0, {}, 16, "prompt", "empty_prompt", ["empty"]),
        (32, {}, 16, "prompt", "context_length_exceeded", ["32 tokens", "length of 32"]),
        (30, {"max_tokens": 3}, 16, "max_tokens", "context_length_exceeded", ["33", "32", "to 2"]),
        (30, {"min_tokens": 3}, 16, "min_tokens", "context_length_exceeded", ["33", "32", "to 2"]),
        (13, {}, 3, "prompt", "context_length_exceeded", ["4 KV blocks of 4", "has 3"]),
        (
            9,
            {"max_tokens": 5},
            3,
            "max_tokens",
            "context_length_exceeded",
            ["9 prompt tokens + max_tokens 5 - 1 = 13", "4 KV blocks", "has 3", "to 4"],
        ),
    ],
)
def test_requests_that_can_never_fit_are_refused_with_the_arithmetic(
    num_prompt_tokens, params, num_blocks, param, code, words
):
    world = World(num_blocks=num_blocks)
    with pytest.raises(InvalidRequestError) as refusal:
        world.add([1] * num_prompt_tokens, **params)
    assert (refusal.value.param, refusal.value.code, refusal.value.status) == (param, code, 400)
    for word in words:
        assert word in refusal.value.message
    assert not world.scheduler.has_unfinished


@pytest.mark.parametrize(
    ("num_prompt_tokens", "params", "num_blocks"),
    [(31, {}, 16), (30, {"max_tokens": 2}, 16), (12, {}, 3), (9, {"max_tokens": 4}, 3)],
)
def test_requests_that_just_fit_are_served(num_prompt_tokens, params, num_blocks):
    world = World(num_blocks=num_blocks)
    world.add([1] * num_prompt_tokens, **params)
    world.drain()


def test_output_without_max_tokens_ends_where_the_room_ends():
    by_context = World().add([1] * 30)
    assert len(by_context.expected) == 2
    world = World(num_blocks=3)
    client = world.add([1] * 9)
    world.drain()
    assert len(client.token_ids) == 4  # 12 positions with KV, and the last token needs none
    assert client.last.finish_reason is FinishReason.LENGTH


def test_request_id_in_use_is_refused_until_it_has_finished():
    world = World()
    client = world.add([1, 2], max_tokens=1)
    with pytest.raises(InvalidRequestError) as refusal:
        world.scheduler.add(client.request)
    assert refusal.value.code == "duplicate_request_id"
    world.drain()
    world.scheduler.add(client.request)


def test_full_queue_is_refused_with_429():
    world = World(max_waiting=2)
    for _ in range(2):
        world.add([1, 2], max_tokens=1)
    with pytest.raises(InvalidRequestError, match="max_waiting = 2") as refusal:
        world.add([1, 2], max_tokens=1)
    assert (refusal.value.status, refusal.value.code) == (429, "queue_full")


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


# Blocks and preemption


def test_admission_takes_the_blocks_of_the_whole_prompt():
    world = World(max_num_batched_tokens=4, num_blocks=8)
    world.add([1] * 14, max_tokens=2)
    assert len(world.step().groups[0].steps[0].new_blocks) == 4
    assert world.step().groups[0].steps[0].new_blocks == []


def test_admission_leaves_spare_blocks_for_running_sequences():
    world = World(num_blocks=4)
    world.add([1] * 5, max_tokens=10)
    world.step()
    world.add([2] * 5, max_tokens=1)
    assert len(world.step().groups[0].steps) == 1  # two blocks are free, but one stays spare
    world.drain()


def crowded_world(**limits) -> World:
    """Two requests that fit together at first and run out of blocks while they decode."""
    world = World(num_blocks=5, prefix_cache=False, **limits)
    world.add([1, 1, 1, 1], max_tokens=16, seed=1)
    world.add([2, 2, 2, 2], max_tokens=16, seed=2)
    return world


def test_the_latest_arrival_is_preempted_and_resumes_with_its_tokens():
    world = crowded_world()
    first, second = world.clients
    while world.scheduler.stats().num_preemptions_total == 0:
        plan = world.step()
    assert plan.groups[0].retired == [1]
    assert [step.seq_id for step in plan.groups[0].steps] == [0]
    num_kept = len(second.token_ids)
    assert 0 < num_kept < 16
    while not (plan := world.step()).groups[0].admitted:
        assert len(second.token_ids) == num_kept
    assert first.is_finished
    [new] = plan.groups[0].admitted
    assert new.seq_id == 2
    assert new.num_prompt_tokens == 4
    assert new.token_ids == [2, 2, 2, 2, *second.expected[:num_kept]]
    assert plan.groups[0].steps[0].uniform == uniform(2, num_kept)
    world.drain()
    assert world.scheduler.stats().num_preemptions_total == 1


def test_a_preempted_request_is_served_before_those_that_wait():
    world = crowded_world(max_num_seqs=2)
    world.add([3], max_tokens=1)
    while world.scheduler.stats().num_preemptions_total == 0:
        world.step()
    while not (plan := world.step()).groups[0].admitted:
        pass
    assert [new.token_ids[0] for new in plan.groups[0].admitted] == [2, 3]
    world.drain()


def test_a_sample_in_flight_survives_preemption_and_delays_readmission():
    world = crowded_world(pipeline_depth=2)
    second = world.clients[1]
    world.schedule()
    while world.scheduler.stats().num_preemptions_total == 0:
        world.schedule()
        if world.scheduler.num_in_flight == 2 and not world.scheduler.stats().num_preemptions_total:
            world.complete()
    num_known = len(second.token_ids)
    world.abort(world.clients[0])  # all blocks are free now, but the token is not known yet
    assert world.schedule() is None
    world.complete()
    assert len(second.token_ids) == num_known + 1
    plan = world.schedule()
    assert plan.groups[0].admitted[0].token_ids == [2] * 4 + second.token_ids
    world.drain()


def test_the_latest_of_several_is_preempted():
    world = World(num_blocks=9, prefix_cache=False)
    for token in (1, 2, 3):
        world.add([token] * 4, max_tokens=16)
    while world.scheduler.stats().num_preemptions_total == 0:
        plan = world.step()
    assert plan.groups[0].retired == [2]
    assert [step.seq_id for step in plan.groups[0].steps] == [0, 1]
    world.drain()


def test_cached_tokens_are_those_of_the_first_admission():
    world = World(num_blocks=5)
    world.add([1] * 4, max_tokens=16)
    client = world.add([2] * 4, max_tokens=16)
    world.drain()
    assert world.scheduler.stats().num_preemptions_total == 1
    assert client.last.num_cached_tokens == 0
    assert world.scheduler.stats().prefix_hit_tokens_total == 0


def test_prompt_logprobs_are_not_repeated_after_preemption():
    world = World(num_blocks=5, prefix_cache=False)
    world.add([1] * 4, max_tokens=16)
    client = world.add([2, 3, 4, 5], max_tokens=16, prompt_logprobs=0)
    world.drain()
    assert world.scheduler.stats().num_preemptions_total > 0
    assert [entry.token_id for entry in client.prompt_logprobs] == [3, 4, 5]


def test_prompt_logprobs_arrive_chunk_by_chunk():
    world = World(max_prefill_chunk=2)
    client = world.add([1, 2, 3, 4, 5], max_tokens=1, prompt_logprobs=0)
    known = []
    while not client.is_finished:
        world.step()
        known.append(len(client.prompt_logprobs))
    assert known == [2, 4, 4]


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


def test_abort_of_a_preempted_request():
    world = crowded_world()
    while world.scheduler.stats().num_preemptions_total == 0:
        world.step()
    world.abort(world.clients[1])
    world.drain()
    assert len(world.clients[0].token_ids) == 16


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
