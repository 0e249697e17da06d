"""The sampler of one attention-DP group: what each sequence asked for, and in which order it acts.

The order is vLLM's (v1 ``Sampler``): raw log-probabilities come from the logits untouched. For the
token, logit bias and the mask of stop ids before ``min_tokens`` come first, then the repetition,
frequency and presence penalties. A greedy row takes the most likely token; any other goes through
temperature, min_p, top_k and top_p to the draw. A temperature below 1e-5 is greedy.

Where this differs from vLLM:
- The draw inverts the cumulative distribution in order of token ids with a number the plan
  carries, instead of a random generator per request; the distribution is the same.
- Equally likely tokens are ranked by id, where vLLM gives all of them the worst rank.
- NaN logits count as -inf. If nothing is left to choose, the token is 0.

The last part, from the temperature on, is one operator (`ops.sampling.sample_tokens`) that takes
five numbers a row; rows whose logits are as the model made them (`Sampler.is_plain`) need no more.
Nothing here waits for the device.

Shapes: B rows of the batch, R some of them, N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_engine.engine.pending import LogprobRows, PendingLogprobs, to_host
from moe_engine.ops.sampling import (
    apply_output_penalties,
    apply_repetition_penalty,
    greedy_tokens,
    params_device,
    sample_tokens,
    to_float32_without_nan,
    top_logprobs,
)
from moe_engine.ops.transfer import to_device
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import NewSequence

_GREEDY_BELOW_TEMPERATURE = 1e-5

# Ranking takes int64 temporaries of the size of the logits; this bounds them for long prompts.
_LOGPROB_ROWS_AT_ONCE = 128

# A positive repetition penalty must stay positive in float32.
_SMALLEST_REPETITION_PENALTY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of the logits.

    Attributes:
        seq_id: an admitted sequence.
        uniform: a number in [0, 1) that decides the token (see `SequenceStep.uniform`).
        num_output_tokens: output tokens sampled before this one.
    """

    seq_id: int
    uniform: float
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class _SequenceState:
    """What the sampler keeps of a sequence; a tensor is there only if the parameters need it.

    Attributes:
        draw: temperature (0 if greedy), top_k (0 if off), top_p, min_p.
        bias: token ids (int64) and what to add to their logits (float32).
        early_stop_ids: int64, the stop ids that ``min_tokens`` holds back.
        output_counts_V: int32, how often the output has each token.
        prompt_mask_V: bool, whether the prompt has the token.
    """

    params: SamplingParams
    draw: tuple[float, float, float, float]
    bias: tuple[torch.Tensor, torch.Tensor] | None
    early_stop_ids: torch.Tensor | None
    output_counts_V: torch.Tensor | None
    prompt_mask_V: torch.Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether the token is drawn from the raw logits."""
        extras = (self.bias, self.early_stop_ids, self.output_counts_V)
        return all(extra is None for extra in extras)

    @property
    def is_argmax(self) -> bool:
        """Whether the most likely token of the raw logits is always the one."""
        return self.is_plain and self.draw[0] == 0.0

    @property
    def filters(self) -> bool:
        """Whether top_k, top_p or min_p may keep a token from being drawn."""
        temperature, top_k, top_p, min_p = self.draw
        return temperature > 0.0 and (top_k > 0.0 or top_p < 1.0 or min_p > 0.0)


class Sampler:
    """Samples the sequences of one DP group and remembers what their penalties need."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """Logits will have ``vocab_size`` columns and lie on ``device``."""
        self._vocab_size = vocab_size
        self._device = device
        self._states: dict[int, _SequenceState] = {}
        self._not_argmax: set[int] = set()
        self._not_plain: set[int] = set()
        self._filtering: set[int] = set()
        self._with_logprobs: set[int] = set()
        self._one = torch.ones(1, dtype=torch.int32, device=device)

    def admit(self, sequence: NewSequence) -> None:
        """Start to hold a sequence; tokens after its prompt count as its outputs so far.

        Its token ids and parameters are taken to be inside the vocabulary
        (`SamplingParams.check_vocabulary`).
        """
        assert sequence.seq_id not in self._states, f"sequence {sequence.seq_id} admitted twice"
        params = sequence.params
        penalizes_prompt = params.repetition_penalty != 1.0
        penalizes_output = (
            penalizes_prompt or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        )
        prompt_ids = sequence.token_ids[: sequence.num_prompt_tokens]
        output_ids = sequence.token_ids[sequence.num_prompt_tokens :]
        # A stop id that the model has no logit for cannot be sampled, so needs no mask.
        stop_ids = [stop_id for stop_id in sequence.stop_ids if stop_id < self._vocab_size]
        state = _SequenceState(
            params=params,
            draw=self._draw_of(params),
            bias=self._bias(params.logit_bias) if params.logit_bias else None,
            early_stop_ids=(
                self._to_device(stop_ids, torch.int64) if params.min_tokens and stop_ids else None
            ),
            output_counts_V=self._counts(output_ids) if penalizes_output else None,
            prompt_mask_V=self._counts(prompt_ids) > 0 if penalizes_prompt else None,
        )
        self._states[sequence.seq_id] = state
        if not state.is_argmax:
            self._not_argmax.add(sequence.seq_id)
        if not state.is_plain:
            self._not_plain.add(sequence.seq_id)
        if state.filters:
            self._filtering.add(sequence.seq_id)
        if params.logprobs is not None:
            self._with_logprobs.add(sequence.seq_id)

    def retire(self, seq_id: int) -> None:
        """Forget a sequence."""
        del self._states[seq_id]
        self._not_argmax.discard(seq_id)
        self._not_plain.discard(seq_id)
        self._filtering.discard(seq_id)
        self._with_logprobs.discard(seq_id)

    def is_argmax(self, seq_ids: Iterable[int]) -> bool:
        """Whether `sample` would take the most likely token of the raw logits for all of them.

        Then it need not be called at all.
        """
        return self._not_argmax.isdisjoint(seq_ids)

    def is_plain(self, seq_ids: Iterable[int]) -> bool:
        """Whether all of them draw from the raw logits: `draw_params` is all `sample` goes by.

        They have no logit bias, no stop ids to hold back and no penalties.
        """
        return self._not_plain.isdisjoint(seq_ids)

    def filters(self, seq_ids: Iterable[int]) -> bool:
        """Whether any of them draws with top_k, top_p or min_p."""
        return not self._filtering.isdisjoint(seq_ids)

    def draw_params(self, seq_ids: Sequence[int], uniforms: Sequence[float]) -> np.ndarray:
        """What `moe_engine.ops.sampling.sample_tokens` needs to know of rows, float64 [5, B]."""
        params_5B = np.empty((5, len(seq_ids)))
        if seq_ids:
            params_5B[:4] = np.array([self._states[seq_id].draw for seq_id in seq_ids]).T
        params_5B[4] = uniforms
        assert ((params_5B[4] >= 0.0) & (params_5B[4] < 1.0)).all()
        return params_5B

    def sample(self, logits_BV: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
        """Choose the next token of every row and count it among its sequence's outputs.

        A row's token depends on that row alone, whatever else is in the batch.

        Args:
            logits_BV: [B, vocab_size] of any float dtype; not changed.
            rows: B rows of distinct sequences.

        Returns:
            int64 [B] on the device.
        """
        assert logits_BV.shape == (len(rows), self._vocab_size)
        states = [self._states[row.seq_id] for row in rows]
        if not all(state.is_plain for state in states):
            logits_BV = self._adjust(to_float32_without_nan(logits_BV), rows, states)
        params_5B = self.draw_params([row.seq_id for row in rows], [row.uniform for row in rows])
        if params_5B[0].any():
            on_device = to_device(params_5B, torch.float64, params_device(self._device))
            may_filter = self.filters(row.seq_id for row in rows)
            tokens_B = sample_tokens(logits_BV, on_device, may_filter=may_filter)
        else:
            tokens_B = greedy_tokens(logits_BV)
        for i, state in enumerate(states):
            if state.output_counts_V is not None:
                state.output_counts_V.scatter_add_(0, tokens_B[i : i + 1], self._one)
        return tokens_B

    def logprobs(
        self, logits_BV: torch.Tensor, tokens_B: torch.Tensor, seq_ids: Sequence[int]
    ) -> PendingLogprobs | None:
        """Raw log-probabilities of the sampled tokens, for the rows whose request wants them.

        Raw means the float32 log-softmax of the logits before any bias, penalty or temperature.

        Args:
            logits_BV: [B, vocab_size] of any float dtype.
            tokens_B: int64, what was sampled.
            seq_ids: the sequences of the B rows.

        Returns:
            None if no row wants them.
        """
        if self._with_logprobs.isdisjoint(seq_ids):
            return None
        rows = [row for row, seq_id in enumerate(seq_ids) if seq_id in self._with_logprobs]
        num_tops = [self._states[seq_ids[row]].params.logprobs or 0 for row in rows]
        if len(rows) < len(seq_ids):
            rows_R = self._to_device(rows, torch.int64)
            logits_BV, tokens_B = logits_BV[rows_R], tokens_B[rows_R]
        return PendingLogprobs(self._logprobs(logits_BV, tokens_B, max(num_tops)), rows, num_tops)

    def prompt_logprobs(
        self, logits_NV: torch.Tensor, target_ids_N: torch.Tensor, num_top: int
    ) -> PendingLogprobs:
        """Raw log-probabilities of prompt tokens.

        Args:
            logits_NV: [N, vocab_size] of any float dtype, at the positions before the targets.
            target_ids_N: int64, the prompt tokens that come next.
            num_top: how many alternatives to report.
        """
        rows = list(range(len(target_ids_N)))
        parts = self._logprobs(logits_NV, target_ids_N, num_top)
        return PendingLogprobs(parts, rows, [num_top] * len(rows))

    def _adjust(
        self,
        logits_BV: torch.Tensor,
        rows: Sequence[SampleRow],
        states: Sequence[_SequenceState],
    ) -> torch.Tensor:
        """What also changes a greedy choice: bias, min_tokens, penalties. Uses up its logits."""
        for i, (row, state) in enumerate(zip(rows, states, strict=True)):
            if state.bias is not None:
                logits_BV[i].index_add_(0, *state.bias)
            if state.early_stop_ids is not None and row.num_output_tokens < state.params.min_tokens:
                logits_BV[i].index_fill_(0, state.early_stop_ids, -torch.inf)

        logits_BV = self._on_rows(
            logits_BV, states, lambda s: s.prompt_mask_V is not None, self._repetition_penalty
        )
        return self._on_rows(
            logits_BV,
            states,
            lambda s: s.params.frequency_penalty != 0.0 or s.params.presence_penalty != 0.0,
            self._output_penalties,
        )

    def _repetition_penalty(
        self, logits_RV: torch.Tensor, states: Sequence[_SequenceState]
    ) -> torch.Tensor:
        prompt_RV = torch.stack([s.prompt_mask_V for s in states if s.prompt_mask_V is not None])
        penalties = [max(s.params.repetition_penalty, _SMALLEST_REPETITION_PENALTY) for s in states]
        return apply_repetition_penalty(
            logits_RV,
            prompt_RV | (_stack_counts(states) > 0),
            self._to_device(penalties, torch.float32),
        )

    def _output_penalties(
        self, logits_RV: torch.Tensor, states: Sequence[_SequenceState]
    ) -> torch.Tensor:
        return apply_output_penalties(
            logits_RV,
            _stack_counts(states),
            self._to_device([s.params.frequency_penalty for s in states], torch.float32),
            self._to_device([s.params.presence_penalty for s in states], torch.float32),
        )

    def _on_rows(
        self,
        logits_BV: torch.Tensor,
        states: Sequence[_SequenceState],
        wants: Callable[[_SequenceState], bool],
        apply: Callable[[torch.Tensor, Sequence[_SequenceState]], torch.Tensor],
    ) -> torch.Tensor:
        """Send the rows whose sequence ``wants`` an operation through ``apply``."""
        chosen = [i for i, state in enumerate(states) if wants(state)]
        if not chosen:
            return logits_BV
        some = [states[i] for i in chosen]
        if len(chosen) == len(states):
            return apply(logits_BV, some)
        chosen_R = self._to_device(chosen, torch.int64)
        return logits_BV.index_copy(0, chosen_R, apply(logits_BV.index_select(0, chosen_R), some))

    def _logprobs(
        self, logits_NV: torch.Tensor, token_ids_N: torch.Tensor, num_top: int
    ) -> list[LogprobRows]:
        """Log-probabilities of every row, on their way to the host."""
        num_top = min(num_top, self._vocab_size)
        parts = []
        for start in range(0, len(token_ids_N), _LOGPROB_ROWS_AT_ONCE):
            part = slice(start, start + _LOGPROB_ROWS_AT_ONCE)
            found = top_logprobs(logits_NV[part], token_ids_N[part], num_top)
            parts.append(LogprobRows(*map(to_host, (token_ids_N[part], *found))))
        return parts

    def _bias(self, logit_bias: dict[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            self._to_device(list(logit_bias), torch.int64),
            self._to_device(list(logit_bias.values()), torch.float32),
        )

    def _counts(self, token_ids: list[int]) -> torch.Tensor:
        """How often each token occurs, int32 [V]."""
        counts_V = torch.zeros(self._vocab_size, dtype=torch.int32, device=self._device)
        ids = self._to_device(token_ids, torch.int64)
        return counts_V.scatter_add_(0, ids, self._one.expand(len(token_ids)))

    def _draw_of(self, params: SamplingParams) -> tuple[float, float, float, float]:
        is_greedy = params.temperature < _GREEDY_BELOW_TEMPERATURE
        has_top_k = 0 < params.top_k < self._vocab_size
        return (
            0.0 if is_greedy else params.temperature,
            float(params.top_k) if has_top_k else 0.0,
            params.top_p,
            params.min_p,
        )

    def _to_device(self, values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return to_device(values, dtype, self._device)


def _stack_counts(states: Sequence[_SequenceState]) -> torch.Tensor:
    """The output counts of sequences that have penalties, int32 [R, V]."""
    return torch.stack([s.output_counts_V for s in states if s.output_counts_V is not None])
