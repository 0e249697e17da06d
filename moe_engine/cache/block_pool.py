"""Who holds which KV block of one DP group.

A block is in exactly one of three places:

- held: one or more sequences have it in their block table (its reference count says how many);
- cached: nobody holds it, but its content is registered under a digest, so that a sequence with
  the same prefix may take it; these blocks wait in an LRU order to be taken or evicted;
- free: nobody holds it and nothing is known about its content.

Digests are opaque here; `cache.prefix` makes them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference-counted KV blocks ``0 .. num_blocks - 1`` with an LRU of cached ones."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low ids are handed out first
        self._lru: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out: free ones and cached ones that nobody holds."""
        return len(self._free) + len(self._lru)

    def ref_count(self, block_id: int) -> int:
        """How many holders the block has."""
        return self._ref_counts[block_id]

    def num_unheld(self, block_ids: Iterable[int]) -> int:
        """How many of the blocks nobody holds: by so many `hold` lowers `num_free`."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take ``num_blocks`` blocks with reference count 1, or None and no change at all.

        Free blocks go first; then the least recently used cached blocks lose their content.
        """
        if num_blocks > self.num_free:
            return None
        block_ids = []
        for _ in range(num_blocks):
            if self._free:
                block_id = self._free.pop()
            else:
                block_id, _ = self._lru.popitem(last=False)
                del self._block_of[self._digest_of.pop(block_id)]
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def hold(self, block_ids: Iterable[int]) -> None:
        """Add a reference to each of these cached or held blocks."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0 or block_id in self._lru, (
                f"block {block_id} is free: there is no content to share"
            )
            self._ref_counts[block_id] += 1
            self._lru.pop(block_id, None)

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference to each block of a block table (given in position order).

        Registered blocks without a holder become the most recently used of the cached ones, in an
        order that evicts the end of the table before its beginning: a block is of no use to
        anybody without all those before it.
        """
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, f"block {block_id} is released but not held"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                if block_id in self._digest_of:
                    self._lru[block_id] = None
                else:
                    self._free.append(block_id)

    def register(self, block_id: int, digest: bytes) -> bool:
        """Make a held block findable under the digest of its content.

        Returns False, and leaves the block private, when another block has that content already.
        """
        assert self._ref_counts[block_id] > 0, f"block {block_id} is registered but not held"
        assert block_id not in self._digest_of, f"block {block_id} is registered twice"
        if digest in self._block_of:
            return False
        self._block_of[digest] = block_id
        self._digest_of[block_id] = digest
        return True

    def find(self, digest: bytes) -> int | None:
        """The block with this content, held or cached; None if there is none."""
        return self._block_of.get(digest)

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless these tables are exactly what holds the pool's blocks.

        With no tables this says that every block is free or cached.
        """
        held = Counter(block_id for table in block_tables for block_id in table)
        places = Counter((*self._free, *self._lru, *held))
        for block_id in range(self.num_blocks):
            if self._ref_counts[block_id] != held[block_id]:
                raise AssertionError(
                    f"block {block_id} has {self._ref_counts[block_id]} references "
                    f"but {held[block_id]} block tables hold it"
                )
            if places[block_id] != 1:
                raise AssertionError(f"block {block_id} is in {places[block_id]} places, not in 1")
        if {block_id: digest for digest, block_id in self._block_of.items()} != self._digest_of:
            raise AssertionError("the digests of the pool and their blocks do not match")
