"""The prefix cache: digests that identify content, and what the scheduler reuses."""

from __future__ import annotations

import hashlib
import random
import struct

import pytest

from moe_engine.cache.block_pool import BlockPool
from moe_engine.cache.prefix import block_digest, extend_digests, find_prefix
from tests.unit.scheduler_world import World


def digests_of(token_ids: list[int], block_size: int) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, token_ids, block_size)
    return digests


def test_digest_is_blake2b_of_the_parent_and_the_tokens():
    expected = hashlib.blake2b(b"parent" + struct.pack("3q", 1, 2, 151935), digest_size=32)
    assert block_digest(b"parent", [1, 2, 151935]) == expected.digest()


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)])
def test_only_full_blocks_have_a_digest(num_tokens, num_blocks):
    assert len(digests_of(list(range(num_tokens)), 4)) == num_blocks


def test_digest_depends_on_every_earlier_token_and_on_nothing_later():
    tokens = [random.randrange(1000) for _ in range(20)]
    digests = digests_of(tokens, 4)
    for position in range(20):
        changed = tokens.copy()
        changed[position] += 1
        others = digests_of(changed, 4)
        same = [a == b for a, b in zip(digests, others, strict=True)]
        assert same == [index < position // 4 for index in range(5)]


def test_digests_grow_with_the_sequence():
    tokens = list(range(37))
    digests: list[bytes] = []
    for length in range(38):
        extend_digests(digests, tokens[:length], 5)
    assert digests == digests_of(tokens, 5)
    assert len(set(digests)) == 7


def test_equal_blocks_at_different_positions_differ():
    first, second = digests_of([1, 2, 1, 2], 2)
    assert first != second


def test_find_prefix_stops_at_the_first_unknown_block():
    pool = BlockPool(4)
    digests = digests_of(list(range(8)), 2)
    blocks = pool.allocate(4)
    for index in (0, 1, 3):
        pool.register(blocks[index], digests[index])
    assert find_prefix(pool, digests, 4) == blocks[:2]
    assert find_prefix(pool, digests, 1) == blocks[:1]
    assert find_prefix(pool, digests, 0) == []
    assert find_prefix(pool, digests_of([9] * 8, 2), 4) == []


def computed_tokens(plan) -> list[int]:
    return [step.num_tokens for group in plan.groups for step in group.steps]


def test_a_later_request_computes_only_what_differs():
    world = World()
    world.add([1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=1)
    world.drain()
    client = world.add([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], max_tokens=1)
    plan = world.step()
    assert computed_tokens(plan) == [2]
    assert plan.groups[0].steps[0].start == 8
    assert client.last.num_cached_tokens == 8


def test_copies_of_a_prompt_share_blocks_within_one_step():
    world = World()
    for _ in range(3):
        world.add([1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=2)
    plan = world.schedule()
    assert computed_tokens(plan) == [9, 1, 1]
    tables = [step.new_blocks for step in plan.groups[0].steps]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    world.drain()


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(4, 0), (5, 4), (8, 4), (9, 8)])
def test_at_least_one_token_is_computed(num_tokens, num_cached):
    world = World()
    for _ in range(2):
        client = world.add(list(range(1, num_tokens + 1)), max_tokens=1)
        world.drain()
    assert client.last.num_cached_tokens == num_cached


def test_output_tokens_are_reused_by_the_next_turn():
    world = World()
    client = world.add([1, 2, 3], max_tokens=10)
    world.drain()
    turn = world.add([1, 2, 3, *client.token_ids, 6], max_tokens=1)
    world.drain()
    assert turn.last.num_cached_tokens == 12


def test_requests_that_want_prompt_logprobs_compute_every_position():
    world = World()
    world.add([1, 2, 3, 4, 5, 6], max_tokens=1)
    world.drain()
    client = world.add([1, 2, 3, 4, 5, 6], max_tokens=1, prompt_logprobs=0)
    assert computed_tokens(world.step()) == [6]
    assert [entry.token_id for entry in client.prompt_logprobs] == [2, 3, 4, 5, 6]
    assert world.scheduler.stats().prefix_queried_tokens_total == 6


def test_nothing_is_reused_when_the_cache_is_off():
    world = World(prefix_cache=False)
    for _ in range(2):
        world.add([1, 2, 3, 4, 5, 6], max_tokens=1)
        assert computed_tokens(world.step()) == [6]
    assert world.scheduler.stats().prefix_queried_tokens_total == 0


def test_chunks_are_reused_as_soon_as_they_are_planned():
    world = World(max_prefill_chunk=4, pipeline_depth=2)
    world.add([1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=1)
    world.schedule()
    world.add([1, 2, 3, 4, 6], max_tokens=1)
    plan = world.schedule()
    assert [(step.start, step.num_tokens) for step in plan.groups[0].steps] == [(4, 4), (4, 1)]
    world.drain()


def test_cached_blocks_give_way_to_new_requests():
    world = World(num_blocks=4)
    world.add([1] * 15, max_tokens=1)
    world.drain()
    other = world.add([2] * 15, max_tokens=1)
    world.drain()
    assert other.last.num_cached_tokens == 0
    again = world.add([1] * 15, max_tokens=1)
    world.drain()
    assert again.last.num_cached_tokens == 0


def test_hit_tokens_are_counted_at_the_first_admission():
    world = World()
    world.add([1, 2, 3, 4, 5], max_tokens=1)
    world.drain()
    world.add([1, 2, 3, 4, 6], max_tokens=1)
    world.drain()
    stats = world.scheduler.stats()
    assert (stats.prefix_queried_tokens_total, stats.prefix_hit_tokens_total) == (10, 4)
    assert (stats.prompt_tokens_total, stats.generation_tokens_total) == (10, 2)


def test_a_block_that_a_lone_token_fills_is_offered_in_the_next_step():
    """Two sequences that compute one position each write and read at the same time."""
    world = World(block_size=2, max_prefill_chunk=3, pipeline_depth=1)
    world.add([1, 2, 3, 4], max_tokens=1)
    world.step()
    world.add([1, 2, 3, 4, 5], max_tokens=1)  # its first four tokens are complete with this step
    plan = world.step()
    assert computed_tokens(plan) == [1, 3]
    world.drain()
    world.add([1, 2, 3, 4, 6], max_tokens=1)
    assert computed_tokens(world.step()) == [1]
