"""The block pool: who holds a block, what is cached, what is evicted first."""

from __future__ import annotations

import random

import pytest

from moe_engine.cache.block_pool import BlockPool


def cached_pool(num_blocks: int) -> BlockPool:
    """All blocks cached under digests ``b"0"``, ``b"1"``, ...; none held."""
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(num_blocks)
    for block in blocks:
        pool.register(block, str(block).encode())
    pool.release(blocks)
    return pool


def test_every_block_is_handed_out_once():
    pool = BlockPool(5)
    assert sorted(pool.allocate(2) + pool.allocate(3)) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0


@pytest.mark.parametrize("wanted", [4, 100])
def test_allocation_is_all_or_nothing(wanted):
    pool = BlockPool(4)
    held = pool.allocate(1)
    assert pool.allocate(wanted) is None
    assert pool.num_free == 3
    pool.check([held])
    assert pool.allocate(3) is not None


def test_failed_allocation_evicts_nothing():
    pool = cached_pool(3)
    assert pool.allocate(4) is None
    assert [pool.find(b"0"), pool.find(b"1"), pool.find(b"2")] == [0, 1, 2]


def test_allocating_no_blocks_succeeds_on_an_exhausted_pool():
    pool = BlockPool(1)
    pool.allocate(1)
    assert pool.allocate(0) == []


def test_a_shared_block_is_free_when_its_last_holder_lets_go():
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.register(block, b"x")
    pool.hold([block])
    assert pool.ref_count(block) == 2
    pool.release([block])
    assert pool.num_free == 1
    pool.release([block])
    assert pool.num_free == 2


def test_unregistered_blocks_are_used_before_any_cached_one_is_evicted():
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    pool.register(blocks[0], b"x")
    pool.release(blocks)
    assert blocks[0] not in pool.allocate(3)
    assert pool.find(b"x") == blocks[0]


def test_eviction_takes_the_least_recently_used_first():
    pool = BlockPool(3)
    for digest in (b"a", b"b", b"c"):
        [block] = pool.allocate(1)
        pool.register(block, digest)
        pool.release([block])
        pool.allocate(0)
    pool.hold([pool.find(b"a")])  # used again: now b is the oldest
    pool.release([pool.find(b"a")])
    pool.allocate(1)
    assert pool.find(b"b") is None
    pool.allocate(1)
    assert pool.find(b"c") is None
    assert pool.find(b"a") is not None


def test_the_tail_of_a_sequence_is_evicted_before_its_head():
    pool = cached_pool(3)
    pool.allocate(1)
    assert [pool.find(b"0"), pool.find(b"1"), pool.find(b"2")] == [0, 1, None]


def test_an_evicted_block_forgets_its_content():
    pool = cached_pool(1)
    [block] = pool.allocate(1)
    assert pool.find(b"0") is None
    assert pool.register(block, b"new")
    assert pool.find(b"new") == block


def test_held_cached_blocks_are_not_evicted():
    pool = cached_pool(3)
    pool.hold([1])
    assert sorted(pool.allocate(2)) == [0, 2]
    assert pool.allocate(1) is None
    assert pool.find(b"1") == 1


def test_num_unheld_is_what_holding_takes_from_the_free_blocks():
    pool = cached_pool(4)
    pool.hold([2])
    before = pool.num_free
    num_unheld = pool.num_unheld([1, 2, 3])
    pool.hold([1, 2, 3])
    assert before - pool.num_free == num_unheld == 2


def test_second_block_with_the_same_content_stays_private():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    assert pool.register(first, b"x")
    assert not pool.register(second, b"x")
    assert pool.find(b"x") == first
    pool.release([second])
    assert pool.allocate(1) == [second]


def test_misuse_is_caught():
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="not held"):
        pool.release([0])
    with pytest.raises(AssertionError, match="no content"):
        pool.hold([0])
    with pytest.raises(AssertionError, match="not held"):
        pool.register(0, b"x")
    [block] = pool.allocate(1)
    pool.register(block, b"x")
    with pytest.raises(AssertionError, match="twice"):
        pool.register(block, b"y")


def test_check_finds_a_leaked_block():
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="1 references but 0 block tables"):
        pool.check([])


def test_check_finds_a_lost_block_and_a_wrong_index():
    pool = BlockPool(2)
    pool._free.pop()
    with pytest.raises(AssertionError, match="is in 0 places"):
        pool.check([])
    pool = cached_pool(2)
    pool._block_of[b"1"] = 0
    with pytest.raises(AssertionError, match="digests"):
        pool.check([])


@pytest.mark.parametrize("seed", range(20))
def test_books_balance_under_random_use(seed):
    rng = random.Random(seed)
    pool = BlockPool(rng.randint(1, 12))
    tables: list[list[int]] = []
    content: dict[int, bytes] = {}  # what was last registered for a block
    for _ in range(200):
        action = rng.randrange(4)
        if action == 0:
            wanted, available = rng.randint(0, 4), pool.num_free
            blocks = pool.allocate(wanted)
            assert (blocks is None) == (wanted > available)
            for block in blocks or ():
                content.pop(block, None)
            tables += [blocks] if blocks else []
        elif action == 1 and tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        elif action == 2 and tables:
            block = rng.choice(rng.choice(tables))
            digest = bytes([rng.randrange(6)])
            if block not in content and pool.register(block, digest):
                content[block] = digest
        else:
            block = pool.find(bytes([rng.randrange(6)]))
            if block is not None:
                pool.hold([block])
                tables.append([block])
        for block, digest in content.items():
            assert pool.find(digest) == block
        pool.check(tables)
    for table in tables:
        pool.release(table)
    pool.check([])
    assert pool.num_free == pool.num_blocks
