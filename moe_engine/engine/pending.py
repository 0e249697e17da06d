"""Results of a step on their way from the device to the host.

Everything is copied to pinned memory by the step's own stream, behind the work that makes it, and
an event marks the end: whoever wants the result waits for that event alone, not for the steps
launched since.

Shape legend: R rows, K alternatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from moe_engine.types.step import Logprobs, PromptLogprobs, SampledToken, StepResult


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in (pinned) host memory, valid once the device has got there."""
    return tensor.to("cpu", non_blocking=True, copy=True)


@dataclass(frozen=True)
class LogprobRows:
    """Log-probabilities of R positions, on the host.

    Attributes:
        token_ids_R, ranks_R: int64; logprobs_R: float32.
        top_ids_RK, top_logprobs_RK: the most likely tokens, best first.
    """

    token_ids_R: torch.Tensor
    logprobs_R: torch.Tensor
    ranks_R: torch.Tensor
    top_ids_RK: torch.Tensor
    top_logprobs_RK: torch.Tensor


@dataclass(frozen=True)
class PendingLogprobs:
    """Log-probabilities of some rows of a batch.

    Attributes:
        parts: the rows in order, some in each part.
        rows: which rows of the batch they are.
        num_tops: how many alternatives each of them wants.
    """

    parts: list[LogprobRows]
    rows: list[int]
    num_tops: list[int]

    def result(self) -> list[Logprobs]:
        """One entry per row in ``rows``; the copies must have arrived."""
        entries: list[Logprobs] = []
        for part in self.parts:
            columns = (
                part.token_ids_R.tolist(),
                part.logprobs_R.tolist(),
                part.ranks_R.tolist(),
                part.top_ids_RK.tolist(),
                part.top_logprobs_RK.tolist(),
            )
            for token_id, logprob, rank, top_ids, tops in zip(*columns, strict=True):
                num = self.num_tops[len(entries)]
                entries.append(Logprobs(token_id, logprob, rank, top_ids[:num], tops[:num]))
        return entries


@dataclass
class PendingStep:
    """A step that has been launched.

    Attributes:
        is_reported: whether this rank reports the step's result (see `result`).
        seq_ids: the sequences that sample, in the plan's order.
        tokens: int64 on the host, what they sampled.
        logprobs: of the sampled tokens that want them.
        prompt_logprobs: (sequence, first position, log-probabilities from there on, in pieces).
        done: recorded behind everything; None on a CPU, where all is done already.
        check: raises what the device has noticed itself; called once the step is done.
    """

    step_id: int
    dp_group: int
    is_reported: bool
    seq_ids: list[int] = field(default_factory=list)
    tokens: torch.Tensor | None = None
    logprobs: PendingLogprobs | None = None
    prompt_logprobs: list[tuple[int, int, list[PendingLogprobs]]] = field(default_factory=list)
    done: torch.cuda.Event | None = None
    check: Callable[[], None] | None = None

    def result(self) -> StepResult | None:
        """Wait for the step; its DP group's result on TP rank 0, None elsewhere or if idle.

        Raises:
            RuntimeError: the device has failed in this step or before.
            ExchangeTimeout: it has waited in vain for another rank's.
        """
        if self.done is not None:
            self.done.synchronize()
        if self.check is not None:
            self.check()
        if not self.is_reported:
            return None
        result = StepResult(self.step_id, self.dp_group)
        if self.tokens is not None:
            entries: list[Logprobs | None] = [None] * len(self.seq_ids)
            if self.logprobs is not None:
                for row, entry in zip(self.logprobs.rows, self.logprobs.result(), strict=True):
                    entries[row] = entry
            result.tokens.extend(map(SampledToken, self.seq_ids, self.tokens.tolist(), entries))
        for seq_id, start, pieces in self.prompt_logprobs:
            scores = [entry for piece in pieces for entry in piece.result()]
            result.prompt_logprobs.append(PromptLogprobs(seq_id, start, scores))
        return result
