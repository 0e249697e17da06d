"""A simulated device and front end around a `Scheduler`, checking every plan it emits.

`FakeDevice` executes plans by the letter of `types.step`. Instead of keys and values it stores, for
every slot of every KV block, which position of which token prefix was written there, so that a
reused block, a wrong prefix hit or a stray write is seen by the first attention that reads it.
Its tokens are a function of the whole prefix and of the step's random number, so the output of a
request must equal `generate_alone` whatever else happens.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from moe_engine.config import CacheConfig, SchedulerConfig
from moe_engine.engine.scheduler import Scheduler
from moe_engine.engine.seeding import draw64, uniform
from moe_engine.types.messages import AddRequest, RequestUpdate
from moe_engine.types.results import FinishReason
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import (
    Logprobs,
    NewSequence,
    PromptLogprobs,
    SampledToken,
    StepPlan,
    StepResult,
)

VOCAB_SIZE = 7
EOS = 0
ENGINE_SEED = 11


def prefix_hash(parent: int, token_id: int) -> int:
    """Identifies a token prefix by its last token and the hash of those before it."""
    return hash((parent, token_id))


def sample(prefix: int, number: float, masked: frozenset[int]) -> int:
    """The fake model's next token after a prefix; never a masked one."""
    token_id = hash((prefix, number)) % VOCAB_SIZE
    while token_id in masked:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def generate_alone(
    prompt: list[int], params: SamplingParams, seed: int, max_output_tokens: int
) -> tuple[list[int], FinishReason]:
    """What the fake model makes of a request on its own."""
    stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    prefix = 0
    for token_id in prompt:
        prefix = prefix_hash(prefix, token_id)
    output: list[int] = []
    while len(output) < max_output_tokens:
        masked = frozenset(stop_ids) if len(output) < params.min_tokens else frozenset()
        output.append(sample(prefix, uniform(seed, len(output)), masked))
        prefix = prefix_hash(prefix, output[-1])
        if output[-1] in stop_ids:
            return output, FinishReason.STOP
    return output, FinishReason.LENGTH


@dataclass
class DeviceSequence:
    """What a rank keeps of a sequence between `admitted` and `retired`."""

    new: NewSequence
    tokens: list[int]
    prefixes: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    end: int | None = None

    def extend_prefixes(self) -> None:
        while len(self.prefixes) < len(self.tokens):
            parent = self.prefixes[-1] if self.prefixes else 0
            self.prefixes.append(prefix_hash(parent, self.tokens[len(self.prefixes)]))


class FakeDevice:
    """Executes plans in order for all DP groups."""

    def __init__(self, num_groups: int, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.held: list[dict[int, DeviceSequence]] = [{} for _ in range(num_groups)]
        self.kv: list[dict[tuple[int, int], tuple[int, int]]] = [{} for _ in range(num_groups)]
        self.seen_ids: set[int] = set()

    def execute(self, plan: StepPlan) -> list[StepResult]:
        results = []
        for group, group_plan in enumerate(plan.groups):
            held = self.held[group]
            for seq_id in group_plan.retired:
                del held[seq_id]
            for new in group_plan.admitted:
                assert new.seq_id not in self.seen_ids, "a seq_id is used twice"
                self.seen_ids.add(new.seq_id)
                held[new.seq_id] = DeviceSequence(new, list(new.token_ids))
            if group_plan.steps:
                results.append(self._run(plan.step_id, group, group_plan.steps))
        return results

    def _run(self, step_id, group, steps) -> StepResult:
        held, kv = self.held[group], self.kv[group]
        assert len({step.seq_id for step in steps}) == len(steps)
        writers: dict[int, int] = {}
        for step in steps:
            sequence = held[step.seq_id]
            sequence.extend_prefixes()
            sequence.block_table += step.new_blocks
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            assert all(0 <= block < self.num_blocks for block in sequence.block_table)
            if sequence.end is None:  # starts after what the prefix cache had
                assert step.start % self.block_size == 0
            else:
                assert step.start == sequence.end, "positions are skipped or computed twice"
            sequence.end = step.start + step.num_tokens
            assert step.start < sequence.end <= len(sequence.tokens)
            assert sequence.end <= len(sequence.block_table) * self.block_size
            for position in range(step.start, sequence.end):
                block = sequence.block_table[position // self.block_size]
                assert writers.setdefault(block, step.seq_id) == step.seq_id, "two writers"
        # Sequences that compute several positions write first. Nothing orders those that compute
        # one: its own is written when its attention reads the cache, the others' may not be.
        lone = [held[step.seq_id] for step in steps if step.num_tokens == 1]
        for step in steps:
            if step.num_tokens > 1:
                self._write(kv, held[step.seq_id], step.start)
        for sequence in lone:
            self._check_reads(kv, sequence, sequence.end - 1)
        for sequence in lone:
            self._write(kv, sequence, sequence.end - 1)
        tokens, prompt_logprobs = [], []
        for step in steps:
            sequence = held[step.seq_id]
            self._check_reads(kv, sequence, sequence.end)
            prompt_logprobs += self._prompt_logprobs(sequence, step)
            assert (step.uniform is not None) == (sequence.end == len(sequence.tokens))
            if step.uniform is not None:
                tokens.append(self._sample(sequence, step.uniform))
        return StepResult(step_id, group, tokens, prompt_logprobs)

    def _write(self, kv, sequence: DeviceSequence, start: int) -> None:
        for position in range(start, sequence.end):
            block = sequence.block_table[position // self.block_size]
            kv[block, position % self.block_size] = (position, sequence.prefixes[position])

    def _check_reads(self, kv, sequence: DeviceSequence, end: int) -> None:
        for position in range(end):
            block = sequence.block_table[position // self.block_size]
            written = kv.get((block, position % self.block_size))
            assert written == (position, sequence.prefixes[position]), (
                f"sequence {sequence.new.seq_id} reads KV that is not its own at {position}"
            )

    def _sample(self, sequence: DeviceSequence, number: float) -> SampledToken:
        new = sequence.new
        num_outputs = len(sequence.tokens) - new.num_prompt_tokens
        is_masked = num_outputs < new.params.min_tokens
        masked = frozenset(new.stop_ids) if is_masked else frozenset()
        token_id = sample(sequence.prefixes[-1], number, masked)
        sequence.tokens.append(token_id)
        logprobs = None
        if new.params.logprobs is not None:
            logprobs = Logprobs(token_id, -float(num_outputs), 1)
        return SampledToken(new.seq_id, token_id, logprobs)

    def _prompt_logprobs(self, sequence: DeviceSequence, step) -> list[PromptLogprobs]:
        if sequence.new.params.prompt_logprobs is None:
            return []
        positions = range(step.start + 1, min(sequence.end + 1, sequence.new.num_prompt_tokens))
        entries = [Logprobs(sequence.tokens[p], -float(p), 1) for p in positions]
        return [PromptLogprobs(step.seq_id, step.start + 1, entries)] if entries else []


@dataclass
class Client:
    """What the front end has heard about one request."""

    request: AddRequest
    expected: list[int]
    expected_reason: FinishReason
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    last: RequestUpdate | None = None

    @property
    def is_finished(self) -> bool:
        return self.last is not None and self.last.finish_reason is not None


class World:
    """A scheduler, its device and its clients."""

    def __init__(
        self,
        *,
        num_groups: int = 1,
        num_blocks: int = 16,
        block_size: int = 4,
        max_model_len: int = 32,
        prefix_cache: bool = True,
        **limits,
    ) -> None:
        self.config = SchedulerConfig(
            **({"max_num_seqs": 4, "max_num_batched_tokens": 16} | limits)
        )
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.max_model_len = max_model_len
        self.scheduler = Scheduler(
            self.config,
            CacheConfig(block_size=block_size, prefix_cache=prefix_cache),
            num_groups=num_groups,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            seed=ENGINE_SEED,
        )
        self.device = FakeDevice(num_groups, num_blocks, block_size)
        self.clients: list[Client] = []
        self.results: deque[list[StepResult]] = deque()
        self.stats = self.scheduler.stats()

    def output_limit(self, prompt: list[int], params: SamplingParams) -> int:
        """Most output tokens; below ``max_tokens``, ``min_tokens`` or 1: cannot be served."""
        room = min(self.max_model_len, self.num_blocks * self.block_size + 1) - len(prompt)
        return room if params.max_tokens is None else min(room, params.max_tokens)

    def add(self, prompt: list[int], params: SamplingParams | None = None, **options) -> Client:
        """Submit a request; ``options`` make its parameters (ignoring eos unless said so)."""
        params = params or SamplingParams(**({"ignore_eos": True} | options))
        seed = draw64(ENGINE_SEED, len(self.clients)) if params.seed is None else params.seed
        limit = max(self.output_limit(prompt, params), 0)
        expected, reason = generate_alone(prompt, params, seed, limit)
        request = AddRequest(f"r{len(self.clients)}", prompt, params)
        self.scheduler.add(request)
        client = Client(request, expected, reason)
        self.clients.append(client)
        return client

    def abort(self, client: Client) -> None:
        was_finished = client.is_finished
        update = self.scheduler.abort(client.request.request_id)
        assert (update is None) == was_finished
        if update is not None:
            assert update.finish_reason is FinishReason.ABORT
            self._hear(update)

    def schedule(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self._check_plan(plan)
            self.results.append(self.device.execute(plan))
            assert len(self.results) <= (self.config.pipeline_depth or 1)
        assert self.scheduler.num_in_flight == len(self.results)
        return plan

    def complete(self) -> list[RequestUpdate]:
        results = self.results.popleft()
        updates = self.scheduler.complete(results)
        assert len({update.request_id for update in updates}) == len(updates)
        for update in updates:
            self._hear(update)
        return updates

    def step(self) -> StepPlan | None:
        """Plan a step and take the results of everything in flight."""
        plan = self.schedule()
        while self.results:
            self.complete()
        return plan

    def drain(self, rng: random.Random | None = None) -> int:
        """Run until every request has ended; returns the number of steps it took.

        ``rng`` decides when results come late; without it they always come as late as possible.
        """
        unfinished = [client for client in self.clients if not client.is_finished]
        work = sum(len(c.request.token_ids) + len(c.expected) for c in unfinished)
        num_steps = 0
        while self.scheduler.has_unfinished or self.results:
            if self.schedule() is None:
                assert self.results, "requests wait, nothing is in flight, and nothing is planned"
                self.complete()
            else:
                num_steps += 1
                if rng is not None and rng.random() < 0.5:
                    self.complete()
            self.check()
            assert num_steps <= 3 * work, "a request starves"
        for client in self.clients:
            assert client.is_finished
        assert self.stats.num_free_blocks == self.stats.num_blocks
        return num_steps

    def check(self) -> None:
        """Invariants that hold after every event."""
        self.scheduler.check_idle()
        before, self.stats = self.stats, self.scheduler.stats()
        for name in self.stats.__struct_fields__:
            if name.endswith("_total"):
                assert getattr(self.stats, name) >= getattr(before, name)
        num_live = sum(not client.is_finished for client in self.clients)
        assert self.stats.num_waiting + self.stats.num_running == num_live
        assert self.scheduler.has_unfinished == (num_live > 0)
        heard = sum(len(client.token_ids) for client in self.clients)
        assert self.stats.generation_tokens_total == heard

    def _check_plan(self, plan: StepPlan) -> None:
        assert any(group.steps for group in plan.groups)
        running: set[int] = set()
        max_chunk = self.config.max_prefill_chunk or self.config.max_num_batched_tokens
        for held, group in zip(self.device.held, plan.groups, strict=True):
            assert group.num_tokens <= self.config.max_num_batched_tokens
            assert all(step.num_tokens <= max_chunk for step in group.steps)
            retired = set(group.retired)
            assert retired <= held.keys()
            remaining = [self._index(held[seq_id].new) for seq_id in held.keys() - retired]
            assert len(remaining) + len(group.admitted) <= self.config.max_num_seqs
            running |= set(remaining)
            for seq_id in retired:
                index = self._index(held[seq_id].new)
                if not self.clients[index].is_finished:  # preempted
                    latest = max(remaining, default=-1)
                    assert index > latest, "not the latest arrival was preempted"
        admitted = [new for group in plan.groups for new in group.admitted]
        for new in sorted(admitted, key=lambda new: new.seq_id):  # the order of admission
            self._check_admission(new, running)

    def _index(self, new: NewSequence) -> int:
        """Which client a sequence belongs to; each has its own parameter object."""
        [index] = [i for i, c in enumerate(self.clients) if c.request.params is new.params]
        return index

    def _check_admission(self, new: NewSequence, running: set[int]) -> None:
        index = self._index(new)
        client = self.clients[index]
        assert not client.is_finished
        assert new.num_prompt_tokens == len(client.request.token_ids)
        assert new.token_ids == client.request.token_ids + client.token_ids
        running.add(index)
        for earlier in range(index):
            assert earlier in running or self.clients[earlier].is_finished, "somebody overtakes"

    def _hear(self, update: RequestUpdate) -> None:
        client = self.clients[int(update.request_id[1:])]
        params, prompt = client.request.params, client.request.token_ids
        assert not client.is_finished, "news of a request that has ended"
        assert update.token_ids or update.prompt_logprobs or update.finish_reason
        if client.last is not None:
            assert update.num_cached_tokens == client.last.num_cached_tokens
        client.last = update
        client.token_ids += update.token_ids
        client.logprobs += update.logprobs
        client.prompt_logprobs += update.prompt_logprobs
        assert client.token_ids == client.expected[: len(client.token_ids)]
        if params.logprobs is not None:
            assert [entry.token_id for entry in client.logprobs] == client.token_ids
        num_known = len(client.prompt_logprobs)
        assert [entry.token_id for entry in client.prompt_logprobs] == prompt[1 : 1 + num_known]
        if params.prompt_logprobs is not None and client.token_ids:
            assert num_known == len(prompt) - 1
            assert update.num_cached_tokens == 0
        if update.finish_reason not in (None, FinishReason.ABORT):
            assert client.token_ids == client.expected
            assert update.finish_reason is client.expected_reason
