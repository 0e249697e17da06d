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

Nothing here waits for the device.

Shapes: B rows of the batch, R some of them, N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from moe_engine.engine.pending import LogprobRows, PendingLogprobs, to_host
from moe_engine.ops.sampling import (
    apply_output_penalties,
    apply_repetition_penalty,
    draw_tokens,
    greedy_tokens,
    mask_min_p,
    mask_top_k,
    mask_top_p,
    scale_by_temperature,
    to_float32_without_nan,
    top_logprobs,
)
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import NewSequence

_GREEDY_BELOW_TEMPERATURE = 1e-5

# Ranking takes int64 temporaries of the size of the logits; this bounds them for long prompts.
_LOGPROB_ROWS_AT_ONCE = 128

# Filters and the draw take about ten times the memory of the logits; this bounds them likewise.
_DRAW_ROWS_AT_ONCE = 64

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
        bias: token ids (int64) and what to add to their logits (float32).
        early_stop_ids: int64, the stop ids that ``min_tokens`` holds back.
        output_counts_V: int32, how often the output has each token.
        prompt_mask_V: bool, whether the prompt has the token.
    """

    params: SamplingParams
    bias: tuple[torch.Tensor, torch.Tensor] | None
    early_stop_ids: torch.Tensor | None
    output_counts_V: torch.Tensor | None
    prompt_mask_V: torch.Tensor | None

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < _GREEDY_BELOW_TEMPERATURE

    @property
    def is_argmax(self) -> bool:
        """Whether the most likely token of the raw logits is always the one."""
        extras = (self.bias, self.early_stop_ids, self.output_counts_V)
        return self.is_greedy and all(extra is None for extra in extras)


class Sampler:
    """Samples the sequences of one DP group and remembers what their penalties need."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """Logits will have ``vocab_size`` columns and lie on ``device``."""
        self._vocab_size = vocab_size
        self._device = device
        self._states: dict[int, _SequenceState] = {}
        self._not_argmax: set[int] = set()
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
        if params.logprobs is not None:
            self._with_logprobs.add(sequence.seq_id)

    def retire(self, seq_id: int) -> None:
        """Forget a sequence."""
        del self._states[seq_id]
        self._not_argmax.discard(seq_id)
        self._with_logprobs.discard(seq_id)

    def is_argmax(self, seq_ids: Iterable[int]) -> bool:
        """Whether `sample` would take the most likely token of the raw logits for all of them.

        Then it need not be called at all.
        """
        return self._not_argmax.isdisjoint(seq_ids)

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
        if all(state.is_argmax for state in states):
            return greedy_tokens(logits_BV)
        adjusted_BV = self._adjust(to_float32_without_nan(logits_BV), rows, states)
        drawn = [i for i, state in enumerate(states) if not state.is_greedy]
        if not drawn:
            tokens_B = greedy_tokens(adjusted_BV)
        elif len(drawn) == len(rows):
            tokens_B = self._draw(adjusted_BV, rows, states)
        else:
            drawn_R = self._to_device(drawn, torch.int64)
            drawn_tokens_R = self._draw(
                adjusted_BV.index_select(0, drawn_R),
                [rows[i] for i in drawn],
                [states[i] for i in drawn],
            )
            tokens_B = greedy_tokens(adjusted_BV).index_copy(0, drawn_R, drawn_tokens_R)
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
        for row, state, logits_V in zip(rows, states, logits_BV.unbind(0), strict=True):
            if state.bias is not None:
                logits_V.index_add_(0, *state.bias)
            if state.early_stop_ids is not None and row.num_output_tokens < state.params.min_tokens:
                logits_V.index_fill_(0, state.early_stop_ids, -torch.inf)

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

    def _draw(
        self,
        logits_RV: torch.Tensor,
        rows: Sequence[SampleRow],
        states: Sequence[_SequenceState],
    ) -> torch.Tensor:
        """Temperature, filters and the draw, for rows that are not greedy; int64 [R]."""
        parts = []
        for start in range(0, len(rows), _DRAW_ROWS_AT_ONCE):
            part = slice(start, start + _DRAW_ROWS_AT_ONCE)
            parts.append(self._draw_part(logits_RV[part], rows[part], states[part]))
        return torch.cat(parts)

    def _draw_part(
        self,
        logits_RV: torch.Tensor,
        rows: Sequence[SampleRow],
        states: Sequence[_SequenceState],
    ) -> torch.Tensor:
        assert all(0.0 <= row.uniform < 1.0 for row in rows)
        temperatures = [state.params.temperature for state in states]
        logits_RV = scale_by_temperature(logits_RV, self._to_device(temperatures, torch.float32))
        logits_RV = self._on_rows(logits_RV, states, lambda s: s.params.min_p > 0.0, self._min_p)
        logits_RV = self._on_rows(
            logits_RV, states, lambda s: 0 < s.params.top_k < self._vocab_size, self._top_k
        )
        logits_RV = self._on_rows(logits_RV, states, lambda s: s.params.top_p < 1.0, self._top_p)
        return draw_tokens(logits_RV, self._to_device([row.uniform for row in rows], torch.float64))

    def _min_p(self, logits_RV: torch.Tensor, states: Sequence[_SequenceState]) -> torch.Tensor:
        return mask_min_p(
            logits_RV, self._to_device([s.params.min_p for s in states], torch.float32)
        )

    def _top_k(self, logits_RV: torch.Tensor, states: Sequence[_SequenceState]) -> torch.Tensor:
        top_ks = [s.params.top_k for s in states]
        return mask_top_k(logits_RV, self._to_device(top_ks, torch.int64), max(top_ks))

    def _top_p(self, logits_RV: torch.Tensor, states: Sequence[_SequenceState]) -> torch.Tensor:
        return mask_top_p(
            logits_RV, self._to_device([s.params.top_p for s in states], torch.float64)
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

    def _to_device(self, values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of host numbers; pinned, because a copy from pageable memory would wait."""
        host = torch.tensor(values, dtype=dtype, pin_memory=self._device.type == "cuda")
        return host.to(self._device, non_blocking=True)


def _stack_counts(states: Sequence[_SequenceState]) -> torch.Tensor:
    """The output counts of sequences that have penalties, int32 [R, V]."""
    return torch.stack([s.output_counts_V for s in states if s.output_counts_V is not None])
