"""Who gets KV blocks, who gives them up, and what a preempted request keeps."""

from __future__ import annotations

from moe_engine.engine.seeding import uniform
from tests.unit.scheduler_world import World


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


def test_abort_of_a_preempted_request():
    world = crowded_world()
    while world.scheduler.stats().num_preemptions_total == 0:
        world.step()
    world.abort(world.clients[1])
    world.drain()
    assert len(world.clients[0].token_ids) == 16
