"""One attention-DP group as the scheduler sees it: its KV blocks, its running sequences, its plan.

How a step is filled, within ``max_num_batched_tokens``:

1. every running sequence that decodes gets its 1 token;
2. running sequences whose prompt is partly computed get their next chunk;
3. the scheduler offers waiting requests; an admitted one gets its first chunk at once.

Blocks. Admission takes the blocks of *all* tokens known at that time, however small the first
chunk is: the prompt will need them within a few steps, and promising the same free blocks to
several long prompts would only have them preempted half-way. So a chunk never lacks a block;
only decoding allocates, one block per ``block_size`` steps. To keep admission from taking the
blocks that decoding is about to need, a quarter of a block per running sequence stays free.

Preemption. When decoding lacks a block, the latest arrival of the group gives up its blocks
(perhaps it is the very sequence that asks). It is never part of the step already, because decoding
is planned in the order of arrival and chunks, which need no blocks, come after. The earliest
arrival of a group is therefore never preempted: it always moves on, which is why nothing starves.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from moe_engine.cache.block_pool import BlockPool
from moe_engine.cache.prefix import extend_digests, find_prefix
from moe_engine.config import CacheConfig, SchedulerConfig
from moe_engine.engine.seeding import uniform
from moe_engine.engine.sequence import Sequence, State
from moe_engine.types.step import GroupPlan, NewSequence, SequenceStep

RUNNING_SEQUENCE_COST = 16
"""What a running sequence weighs against tokens to compute when groups are compared: it will
cost many later steps one token and one read of its KV, so affinity must not pile up sequences in
one group to save a few prompt tokens."""

SEQUENCES_PER_SPARE_BLOCK = 4
"""Admission leaves one block free for so many running sequences: enough for the decode steps of
``block_size / SEQUENCES_PER_SPARE_BLOCK`` steps."""

arrival_order = attrgetter("arrival")


@dataclass(frozen=True, slots=True)
class Offer:
    """What admitting a certain sequence to a group would mean.

    Attributes:
        cached_blocks: blocks of the prefix cache that it would start from.
        num_new_blocks: blocks to allocate for the rest of its tokens.
        cost: see `Group.offer`.
    """

    cached_blocks: list[int]
    num_new_blocks: int
    cost: int


class PlannedStep(NamedTuple):
    """A sequence's share of a planned step, kept until the result arrives.

    ``seq_id`` is the one it had then: it may be preempted and admitted again meanwhile.
    """

    sequence: Sequence
    seq_id: int
    is_sampling: bool


class Group:
    """KV blocks, running sequences and the step under construction of one DP group."""

    def __init__(
        self, index: int, scheduler: SchedulerConfig, cache: CacheConfig, num_blocks: int
    ) -> None:
        self.index = index
        self.pool = BlockPool(num_blocks)
        self.running: list[Sequence] = []  # in the order of arrival
        self._config = scheduler
        self._block_size = cache.block_size
        self._has_prefix_cache = cache.prefix_cache
        self._max_chunk = scheduler.max_prefill_chunk or scheduler.max_num_batched_tokens
        self._retired: list[int] = []
        self._begin_step()

    def _begin_step(self) -> None:
        self._budget = self._config.max_num_batched_tokens
        self._steps: list[SequenceStep] = []
        self._planned: dict[int, PlannedStep] = {}  # by seq_id, in the order of the steps
        self._admitted: list[NewSequence] = []

    @property
    def num_planned(self) -> int:
        """Sequences in the step under construction."""
        return len(self._steps)

    def plan_running(self) -> list[Sequence]:
        """Plan decoding, then chunks; returns the sequences that had to be preempted."""
        preempted: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running.copy():
            num_pending = sequence.num_pending
            if num_pending > 1:
                prefilling.append(sequence)
            elif num_pending == 1 and sequence.state is State.RUNNING:
                self._plan_decode(sequence, preempted)
        for sequence in prefilling:
            num_tokens = min(sequence.num_pending, self._max_chunk, self._budget)
            if sequence.state is State.RUNNING and num_tokens > 0:
                self._add_step(sequence, num_tokens, [])
        return preempted

    def _plan_decode(self, sequence: Sequence, preempted: list[Sequence]) -> None:
        num_missing = self._num_blocks_for(sequence.num_computed + 1) - len(sequence.block_table)
        if num_missing == 0:  # all steps but one in ``block_size``
            self._add_step(sequence, 1, [])
            return
        while (new_blocks := self.pool.allocate(num_missing)) is None:
            victim = self.running[-1]
            self._register(victim)
            self._drop(victim, victim.preempt())
            preempted.append(victim)
            if victim is sequence:
                return
        self._add_step(sequence, 1, new_blocks)

    def reads_cache(self, sequence: Sequence) -> bool:
        """Whether the sequence may start from cached blocks.

        One that wants logprobs of its prompt must compute every position.
        """
        return self._has_prefix_cache and sequence.params.prompt_logprobs is None

    def offer(self, sequence: Sequence) -> Offer | None:
        """What it takes to admit the sequence in this step, or None if it does not fit.

        The cost, to be compared between groups, is in tokens::

            tokens of the sequence that are not cached here
            + tokens that the running sequences still have to compute
            + RUNNING_SEQUENCE_COST x running sequences

        At least the last token is computed, cached or not, because its logits are needed.
        """
        if self._budget == 0 or len(self.running) >= self._config.max_num_seqs:
            return None
        num_spare = -(-len(self.running) // SEQUENCES_PER_SPARE_BLOCK)
        num_available = self.pool.num_free - num_spare
        if num_available < 1:  # no prefix is long enough to do without a new block
            return None
        num_tokens = len(sequence.token_ids)
        cached_blocks: list[int] = []
        if self.reads_cache(sequence):
            extend_digests(sequence.digests, sequence.token_ids, self._block_size)
            max_blocks = (num_tokens - 1) // self._block_size
            cached_blocks = find_prefix(self.pool, sequence.digests, max_blocks)
        num_new_blocks = self._num_blocks_for(num_tokens) - len(cached_blocks)
        if num_new_blocks + self.pool.num_unheld(cached_blocks) > num_available:
            return None
        num_uncached = num_tokens - len(cached_blocks) * self._block_size
        backlog = sum(running.num_pending for running in self.running)
        cost = num_uncached + backlog + RUNNING_SEQUENCE_COST * len(self.running)
        return Offer(cached_blocks, num_new_blocks, cost)

    def admit(self, sequence: Sequence, seq_id: int, offer: Offer) -> None:
        """Admit the sequence under the terms of `offer` and plan its first chunk."""
        self.pool.hold(offer.cached_blocks)  # first, so that allocating cannot evict them
        new_blocks = self.pool.allocate(offer.num_new_blocks)
        assert new_blocks is not None, "an offer stands only until the pool changes"
        self._admitted.append(
            sequence.admit(
                seq_id,
                self.index,
                num_cached_blocks=len(offer.cached_blocks),
                block_size=self._block_size,
            )
        )
        insort(self.running, sequence, key=arrival_order)
        num_tokens = min(sequence.num_pending, self._max_chunk, self._budget)
        self._add_step(sequence, num_tokens, offer.cached_blocks + new_blocks)

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out for good."""
        self._register(sequence)
        self._drop(sequence, sequence.finish())

    def take_plan(self) -> tuple[GroupPlan, list[PlannedStep]]:
        """The step under construction, with what its result will be matched against."""
        plan = GroupPlan(steps=self._steps, admitted=self._admitted, retired=self._retired)
        planned = list(self._planned.values())
        self._retired = []
        self._begin_step()
        return plan, planned

    def check(self) -> None:
        """Raise AssertionError unless the pool's references are those of the running sequences."""
        self.pool.check(sequence.block_table for sequence in self.running)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _add_step(self, sequence: Sequence, num_tokens: int, new_blocks: list[int]) -> None:
        start = sequence.num_computed
        output_index = sequence.next_output_index
        is_lone = num_tokens == 1
        if is_lone:
            self._register(sequence)
        is_sampling = sequence.compute(num_tokens, new_blocks)
        if not is_lone:
            self._register(sequence)
        self._steps.append(
            SequenceStep(
                seq_id=sequence.seq_id,
                start=start,
                num_tokens=num_tokens,
                new_blocks=new_blocks,
                uniform=uniform(sequence.seed, output_index) if is_sampling else None,
            )
        )
        self._planned[sequence.seq_id] = PlannedStep(sequence, sequence.seq_id, is_sampling)
        self._budget -= num_tokens

    def _register(self, sequence: Sequence) -> None:
        """Offer the blocks that are full once all planned steps have run to the prefix cache.

        They may not be written yet, but whoever takes them is planned for this step or a later one.
        Within a step, a layer first writes the KV of the sequences that compute several positions;
        those that compute one each write and read at the same time, so what they fill in this step
        is offered in the next. A position whose token is still on the device has no digest, so its
        block waits.
        """
        if not self._has_prefix_cache:
            return
        num_tokens = min(sequence.num_computed, len(sequence.token_ids))
        num_full_blocks = num_tokens // self._block_size
        if num_full_blocks == sequence.num_registered:
            return
        extend_digests(sequence.digests, sequence.token_ids, self._block_size)
        for index in range(sequence.num_registered, num_full_blocks):
            self.pool.register(sequence.block_table[index], sequence.digests[index])
        sequence.num_registered = num_full_blocks

    def _drop(self, sequence: Sequence, block_table: list[int]) -> None:
        """Forget a sequence that has just been preempted or finished, and free its blocks.

        A step in flight may still write to these blocks (the chunk or decode planned before a
        preemption or an abort; the overrun planned before the end was known). That cannot hurt
        whoever gets them next: steps execute in the order of their plans, and a block released
        now is handed out by the plan that follows, which comes after every step in flight; and in
        that plan the sequence takes no part, since it is preempted before it could be planned
        and finishes between plans. Such a late write never reaches a block that others share
        either: it goes to positions that the sequence alone computes, in a block it allocated.
        If the block is registered, the late write is the very content it is registered for.
        """
        self.running.remove(sequence)
        self.pool.release(block_table)
        self._retired.append(sequence.seq_id)
