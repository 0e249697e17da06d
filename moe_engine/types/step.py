"""`StepPlan`: what the scheduler tells every rank to do next, and what the ranks answer.

Plain data that `msgspec` can carry over a socket. The plan is incremental: a rank keeps the
sequences that were `admitted` to its DP group until they are `retired`, with their tokens and
block tables, so that a decode step costs a few integers per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_engine.types.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that a DP group starts to hold.

    Attributes:
        seq_id: unique while the engine lives; a preempted sequence comes back under a new one.
        token_ids: every token known so far: the prompt, then outputs made before a preemption.
        num_prompt_tokens: how many of ``token_ids`` are the prompt.
        params: sampling parameters; ``params.n`` is already fanned out.
        stop_ids: token ids that end the output; may not be sampled before ``min_tokens``.
    """

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    stop_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """One sequence's share of a step: compute positions ``[start, start + num_tokens)``.

    The tokens at these positions are those of `NewSequence.token_ids` followed by the tokens
    sampled since, in order; the last of them may still be on the device only.

    Attributes:
        start: first position to compute; the KV of ``[0, start)`` is in the block table's blocks.
        num_tokens: positions to compute, at least 1.
        new_blocks: physical KV blocks to append to the sequence's block table before the step.
        uniform: a number in [0, 1) that decides the sampled token, or None when the step ends
            inside the prompt and nothing is sampled. It is a pure function of the request's seed
            and the output position, so the token depends on nothing else in the batch.
    """

    seq_id: int
    start: int
    num_tokens: int
    new_blocks: list[int] = field(default_factory=list)
    uniform: float | None = None

    @property
    def end(self) -> int:
        """The position after the last one computed, which a sampled token takes."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What one attention-DP group does in a step; all lists are empty for an idle group.

    ``retired`` is applied first, then ``admitted``, then ``steps``.
    """

    steps: list[SequenceStep] = field(default_factory=list)
    admitted: list[NewSequence] = field(default_factory=list)
    retired: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the group computes in this step."""
        return sum(step.num_tokens for step in self.steps)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the whole world, the same bytes for every rank.

    Attributes:
        step_id: 0, 1, 2, ... in execution order.
        groups: one plan per attention-DP group.
    """

    step_id: int
    groups: list[GroupPlan]


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Raw log-probabilities at one position: the chosen token's, its rank from 1, and the top."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token that a sequence sampled in a step."""

    seq_id: int
    token_id: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of the prompt tokens at positions ``start``, ``start + 1``, ..."""

    seq_id: int
    start: int
    entries: list[Logprobs]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one DP group sampled in a step, in the order of its plan's sampling sequences."""

    step_id: int
    dp_group: int
    tokens: list[SampledToken] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
