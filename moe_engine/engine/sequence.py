"""One request inside the engine: its tokens, its progress and its state.

    WAITING --admit--> RUNNING --finish--> FINISHED
                       |    ^
                 preempt    admit
                       v    |
                     PREEMPTED --finish--> FINISHED        (WAITING --finish--> FINISHED: aborted)

A sampled token is *in flight* from the step that plans it until `accept_token`. A preempted
sequence still accepts the tokens that were in flight, and may not be admitted before: its
recomputation starts from all its tokens, so none is lost and none is sampled twice.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from moe_engine.errors import IllegalTransitionError
from moe_engine.types.results import FinishReason
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import Logprobs, NewSequence, PromptLogprobs


class State(StrEnum):
    """Where a request stands."""

    WAITING = "WAITING"
    RUNNING = "RUNNING"
    PREEMPTED = "PREEMPTED"
    FINISHED = "FINISHED"


_NEXT_STATE = {
    ("admit", State.WAITING): State.RUNNING,
    ("admit", State.PREEMPTED): State.RUNNING,
    ("compute", State.RUNNING): State.RUNNING,
    ("accept_token", State.RUNNING): State.RUNNING,
    ("accept_token", State.PREEMPTED): State.PREEMPTED,
    ("preempt", State.RUNNING): State.PREEMPTED,
    ("finish", State.WAITING): State.FINISHED,
    ("finish", State.RUNNING): State.FINISHED,
    ("finish", State.PREEMPTED): State.FINISHED,
}


class Sequence:
    """A request's state machine; a method that its state does not allow raises.

    Attributes:
        arrival: rank in the order of arrival; the lower, the sooner it is served.
        seed: of the random numbers that decide its tokens.
        token_ids: the prompt, then the output tokens that the host knows.
        max_output_tokens: the output ends here at the latest.
        seq_id: the id under which the ranks hold it, of the latest admission.
        group: the DP group of the latest admission.
        block_table: KV blocks held, in position order; empty unless running.
        num_computed: positions whose KV the steps planned since the latest admission write, or
            that it found in the prefix cache.
        num_in_flight: sampled tokens that are planned but not known yet.
        digests: of the full blocks of ``token_ids``, as far as they have been asked for.
        num_registered: leading blocks already offered to the prefix cache, or taken from it.
        num_cached_tokens: prompt tokens that the first admission found in the prefix cache.
        num_prompt_logprobs: prompt positions from 1 on whose logprobs have been forwarded.
    """

    def __init__(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        *,
        arrival: int,
        seed: int,
        max_output_tokens: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.arrival = arrival
        self.seed = seed
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = len(token_ids)
        self.max_output_tokens = max_output_tokens
        self.seq_id = -1
        self.group = -1
        self.block_table: list[int] = []
        self.num_computed = 0
        self.num_in_flight = 0
        self.digests: list[bytes] = []
        self.num_registered = 0
        self.num_cached_tokens = 0
        self.num_prompt_logprobs = 0
        # Tokens known or in flight, and their limit: kept, not counted, because a step asks often.
        self._num_tokens = len(token_ids)
        self._max_tokens = len(token_ids) + max_output_tokens
        self._state = State.WAITING
        self._eos_ids = () if params.ignore_eos else tuple(eos_token_ids)
        self._stop_ids = dict.fromkeys((*self._eos_ids, *params.stop_token_ids))

    @property
    def state(self) -> State:
        """Where the request stands; only the methods below change it."""
        return self._state

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that the host knows."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def next_output_index(self) -> int:
        """Which output token, from 0, the next sample will be."""
        return self._num_tokens - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that the next steps could compute: 1 when decoding, more when prefilling.

        0 when the samples in flight are the last ones that ``max_output_tokens`` allows.
        """
        if self._num_tokens >= self._max_tokens:
            return 0
        return self._num_tokens - self.num_computed

    def admit(
        self, seq_id: int, group: int, *, num_cached_blocks: int, block_size: int
    ) -> NewSequence:
        """Enter a DP group whose prefix cache has the KV of the first ``num_cached_blocks``.

        The block table, cached blocks included, comes with the first `compute`.
        """
        if self.num_in_flight > 0:
            raise IllegalTransitionError(self.request_id, self._state, "admit")
        is_first = self._state is State.WAITING
        self._take("admit")
        self.seq_id = seq_id
        self.group = group
        self.num_registered = num_cached_blocks
        self.num_computed = num_cached_blocks * block_size
        if is_first:
            self.num_cached_tokens = self.num_computed
        return NewSequence(
            seq_id=seq_id,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            params=self.params,
            stop_ids=list(self._stop_ids),
        )

    def compute(self, num_tokens: int, new_blocks: list[int]) -> bool:
        """Plan the next ``num_tokens`` positions; True if the step samples a token after them."""
        num_pending = self.num_pending
        if not 0 < num_tokens <= num_pending:
            raise IllegalTransitionError(self.request_id, self._state, "compute")
        if self._state is not State.RUNNING:
            self._take("compute")
        self.block_table.extend(new_blocks)
        self.num_computed += num_tokens
        if num_tokens < num_pending:
            return False
        self.num_in_flight += 1
        self._num_tokens += 1
        return True

    def accept_token(self, token_id: int) -> FinishReason | None:
        """Append the oldest sample in flight; returns why the output ends with it, if it does."""
        if self.num_in_flight == 0:
            raise IllegalTransitionError(self.request_id, self._state, "accept_token")
        if self._state is not State.RUNNING:
            self._take("accept_token")
        self.num_in_flight -= 1
        self.token_ids.append(token_id)
        if token_id in self._stop_ids and self.num_output_tokens > self.params.min_tokens:
            return FinishReason.STOP
        if self.num_output_tokens >= self.max_output_tokens:
            return FinishReason.LENGTH
        return None

    def stop_token_id(self, token_id: int) -> int | None:
        """The token if it ends the output by the user's ``stop_token_ids`` rather than as eos."""
        is_user_stop = token_id in self.params.stop_token_ids and token_id not in self._eos_ids
        return token_id if is_user_stop else None

    def accept_prompt_logprobs(self, result: PromptLogprobs) -> list[Logprobs]:
        """The entries that have not been forwarded yet; a recomputation brings some twice."""
        num_known = self.num_prompt_logprobs + 1 - result.start
        assert num_known >= 0, (
            f"request {self.request_id!r} has prompt logprobs up to position "
            f"{self.num_prompt_logprobs} and got those from {result.start} on"
        )
        entries = result.entries[num_known:]
        self.num_prompt_logprobs += len(entries)
        return entries

    def preempt(self) -> list[int]:
        """Give up the KV, to be admitted again later; returns the blocks to release."""
        self._take("preempt")
        return self._drop_blocks()

    def finish(self) -> list[int]:
        """End for good; returns the blocks to release."""
        self._take("finish")
        return self._drop_blocks()

    def _drop_blocks(self) -> list[int]:
        block_table, self.block_table = self.block_table, []
        return block_table

    def _take(self, event: str) -> None:
        """Change state; an event that leaves a running sequence running may skip the call."""
        next_state = _NEXT_STATE.get((event, self._state))
        if next_state is None:
            raise IllegalTransitionError(self.request_id, self._state, event)
        self._state = next_state
