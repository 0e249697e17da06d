"""The scheduler: decides what every DP group computes in the next step.

A pure function of the requests, the results and the KV block pools: no torch, no clock, no
randomness of its own. `Group` fills one group's share of a step; this module keeps the queue of
waiting requests, spreads them over the groups, and turns results into news for the front end.

Waiting requests are served strictly in the order of arrival: when the first one fits no group,
nobody behind it is admitted either, so that small requests cannot starve a large one. Preempted
requests return to the queue at their place, which is the front, because everything that waits
for its first admission has arrived later.

Pipelining: with ``pipeline_depth`` 2, `schedule` may be called again before the result of the
previous plan is known. A sequence whose sample is in flight is then planned to decode the position
of that token, which only the device knows. If the token turns out to end the sequence, the
surplus step is an overrun: what it samples is ignored, and `Group` argues why its write is safe.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from moe_engine.config import CacheConfig, SchedulerConfig
from moe_engine.engine.group import Group, PlannedStep, arrival_order
from moe_engine.engine.limits import limit_output_tokens
from moe_engine.engine.seeding import draw64
from moe_engine.engine.sequence import Sequence, State
from moe_engine.errors import InvalidRequestError
from moe_engine.types.messages import AddRequest, EngineStats, RequestUpdate
from moe_engine.types.results import FinishReason
from moe_engine.types.step import PromptLogprobs, SampledToken, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    """A plan whose result has not arrived; ``groups`` has the groups that compute something."""

    step_id: int
    groups: dict[int, list[PlannedStep]]


class Scheduler:
    """Plans steps for ``num_groups`` DP groups with ``num_blocks`` KV blocks each.

    Args:
        scheduler: what a step may hold.
        cache: block size and whether prefixes are reused.
        num_groups: attention-DP groups.
        num_blocks: KV blocks of each group.
        max_model_len: longest prompt plus output in tokens.
        eos_token_ids: the model's end-of-sequence tokens.
        seed: seeds the requests that bring no seed of their own.
    """

    def __init__(
        self,
        scheduler: SchedulerConfig,
        cache: CacheConfig,
        *,
        num_groups: int,
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        seed: int,
    ) -> None:
        self._config = scheduler
        self._block_size = cache.block_size
        self._num_blocks = num_blocks
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._seed = seed
        self._groups = [Group(index, scheduler, cache, num_blocks) for index in range(num_groups)]
        self._live: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # in the order of arrival
        self._in_flight: deque[_StepInFlight] = deque()
        self._num_arrivals = 0
        self._num_admissions = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0

    @property
    def num_in_flight(self) -> int:
        """Plans whose results have not arrived."""
        return len(self._in_flight)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._live)

    def add(self, request: AddRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it can never be served (see `limit_output_tokens`), its id is in
                use, or the queue is full (status 429).
        """
        if request.request_id in self._live:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is in use by a request that has not finished; "
                f"choose another one",
                param="request_id",
                code="duplicate_request_id",
            )
        max_output_tokens = limit_output_tokens(
            request,
            max_model_len=self._max_model_len,
            num_blocks=self._num_blocks,
            block_size=self._block_size,
        )
        if len(self._waiting) >= self._config.max_waiting:
            raise InvalidRequestError(
                f"{len(self._waiting)} requests wait already, the limit is max_waiting = "
                f"{self._config.max_waiting}; try again later",
                status=429,
                code="queue_full",
            )
        params = request.params
        seed = draw64(self._seed, self._num_arrivals) if params.seed is None else params.seed
        sequence = Sequence(
            request.request_id,
            request.token_ids,
            params,
            arrival=self._num_arrivals,
            seed=seed,
            max_output_tokens=max_output_tokens,
            eos_token_ids=self._eos_token_ids,
        )
        self._num_arrivals += 1
        self._live[request.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> RequestUpdate | None:
        """End a request now; its last update, or None if the id is unknown or has finished."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return None
        self._finish(sequence)
        return RequestUpdate(
            request_id,
            finish_reason=FinishReason.ABORT,
            num_cached_tokens=sequence.num_cached_tokens,
        )

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to do before a result in flight arrives.

        Retired sequences alone are no reason for a step; they go with the next one.
        """
        if len(self._in_flight) >= (self._config.pipeline_depth or 1):
            return None
        for group in self._groups:
            for sequence in group.plan_running():
                insort(self._waiting, sequence, key=arrival_order)
                self._num_preemptions += 1
        self._admit_waiting()
        if not any(group.num_planned for group in self._groups):
            return None
        plans = []
        in_flight = {}
        for group in self._groups:
            plan, planned = group.take_plan()
            plans.append(plan)
            if planned:
                in_flight[group.index] = planned
        step_id = self._num_steps
        self._num_steps += 1
        self._in_flight.append(_StepInFlight(step_id, in_flight))
        return StepPlan(step_id, plans)

    def complete(self, results: list[StepResult]) -> list[RequestUpdate]:
        """Take the results of the oldest step in flight, one per group that computed something.

        Returns the updates of the requests that have news. What a sequence that has finished
        meanwhile (aborted, or ended by the step before) still brings is ignored.
        """
        assert self._in_flight, "a result arrived, but no step is in flight"
        step = self._in_flight.popleft()
        by_group = {result.dp_group: result for result in results}
        answering = sorted(result.dp_group for result in results)
        assert answering == sorted(step.groups), (
            f"step {step.step_id} ran on DP groups {sorted(step.groups)}, "
            f"but results came from {answering}"
        )
        updates: list[RequestUpdate] = []
        for group, planned in step.groups.items():
            result = by_group[group]
            assert result.step_id == step.step_id, (
                f"DP group {group} answered step {result.step_id}; step {step.step_id} is due"
            )
            updates += self._updates_of_group(planned, result)
        return updates

    def stats(self) -> EngineStats:
        """Counters and gauges as of now, over all groups.

        A request counts once in the prompt and prefix totals, at its first admission; ``queried``
        leaves out requests that may not read the prefix cache. Cached blocks that no sequence
        holds count as free.
        """
        return EngineStats(
            num_waiting=len(self._waiting),
            num_running=sum(len(group.running) for group in self._groups),
            num_blocks=self._num_blocks * len(self._groups),
            num_free_blocks=sum(group.pool.num_free for group in self._groups),
            num_steps_total=self._num_steps,
            num_preemptions_total=self._num_preemptions,
            prompt_tokens_total=self._num_prompt_tokens,
            generation_tokens_total=self._num_generated_tokens,
            prefix_queried_tokens_total=self._num_queried_tokens,
            prefix_hit_tokens_total=self._num_hit_tokens,
        )

    def check_idle(self) -> None:
        """Raise AssertionError if KV blocks leak.

        Every reference to a block must belong to a running sequence's block table; when no
        request lives, this says that every block is free or cached.
        """
        for group in self._groups:
            group.check()

    def _admit_waiting(self) -> None:
        """Admit from the head of the queue for as long as the head fits some group."""
        while self._waiting:
            sequence = self._waiting[0]
            if sequence.num_in_flight > 0:  # preempted; its tokens are not all known yet
                return
            offers = [(group, group.offer(sequence)) for group in self._groups]
            fitting = [(group, offer) for group, offer in offers if offer is not None]
            if not fitting:
                return
            group, offer = min(fitting, key=lambda pair: pair[1].cost)
            is_first = sequence.state is State.WAITING
            del self._waiting[0]
            group.admit(sequence, self._num_admissions, offer)
            self._num_admissions += 1
            if is_first:
                self._num_prompt_tokens += sequence.num_prompt_tokens
                if group.reads_cache(sequence):
                    self._num_queried_tokens += sequence.num_prompt_tokens
                    self._num_hit_tokens += sequence.num_cached_tokens

    def _updates_of_group(
        self, planned: list[PlannedStep], result: StepResult
    ) -> list[RequestUpdate]:
        tokens = {token.seq_id: token for token in result.tokens}
        prompt_logprobs = {entry.seq_id: entry for entry in result.prompt_logprobs}
        sampling_ids = [step.seq_id for step in planned if step.is_sampling]
        assert [token.seq_id for token in result.tokens] == sampling_ids, (
            f"step {result.step_id} samples sequences {sampling_ids} of DP group "
            f"{result.dp_group}, but tokens came for {list(tokens)}"
        )
        unplanned = prompt_logprobs.keys() - {step.seq_id for step in planned}
        assert not unplanned, (
            f"prompt logprobs came for sequences {sorted(unplanned)}, which are not in step "
            f"{result.step_id} of DP group {result.dp_group}"
        )
        updates = []
        for step in planned:
            if step.sequence.state is not State.FINISHED:
                update = self._update(
                    step.sequence, tokens.get(step.seq_id), prompt_logprobs.get(step.seq_id)
                )
                if update is not None:
                    updates.append(update)
        return updates

    def _update(
        self, sequence: Sequence, token: SampledToken | None, prompt: PromptLogprobs | None
    ) -> RequestUpdate | None:
        """What a step has brought for a request; None if it only computed part of its prompt."""
        entries = [] if prompt is None else sequence.accept_prompt_logprobs(prompt)
        if token is None:
            if not entries:
                return None
            return RequestUpdate(
                sequence.request_id,
                prompt_logprobs=entries,
                num_cached_tokens=sequence.num_cached_tokens,
            )
        self._num_generated_tokens += 1
        finish_reason = sequence.accept_token(token.token_id)
        if finish_reason is not None:
            self._finish(sequence)
        is_stop = finish_reason is FinishReason.STOP
        return RequestUpdate(
            sequence.request_id,
            token_ids=[token.token_id],
            logprobs=[] if token.logprobs is None else [token.logprobs],
            prompt_logprobs=entries,
            finish_reason=finish_reason,
            stop_token_id=sequence.stop_token_id(token.token_id) if is_stop else None,
            num_cached_tokens=sequence.num_cached_tokens,
        )

    def _finish(self, sequence: Sequence) -> None:
        del self._live[sequence.request_id]
        if sequence.state is State.RUNNING:
            self._groups[sequence.group].finish(sequence)
        else:
            self._waiting.remove(sequence)
            sequence.finish()
