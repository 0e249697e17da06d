"""Executes step plans on one rank: model, KV cache, sequence table and sampler.

Shape legend: T tokens of the step, R rows that need logits, B sequences that sample, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_engine.cache.kv import KVCache
from moe_engine.config import EngineConfig, ModelConfig
from moe_engine.dist.exchange import ExchangeSelector
from moe_engine.dist.groups import ParallelGroups
from moe_engine.dist.layout import split_evenly
from moe_engine.engine.batch import SequenceTable, StepBatch, largest_group
from moe_engine.engine.sampler import Sampler, SampleRow
from moe_engine.layers.context import ForwardContext
from moe_engine.models.qwen3_moe import Qwen3MoeForCausalLM
from moe_engine.types.step import (
    GroupPlan,
    Logprobs,
    NewSequence,
    PromptLogprobs,
    SampledToken,
    SequenceStep,
    StepPlan,
    StepResult,
)

PROMPT_ROWS_AT_ONCE = 128
"""Prompt positions whose logits, each as wide as the vocabulary, exist at the same time."""


class ModelRunner:
    """One rank's executor; every rank of the world must be given the same plans in order."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        model: Qwen3MoeForCausalLM,
        kv: KVCache,
        groups: ParallelGroups,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._kv = kv
        self._groups = groups
        self._device = device
        self._exchange = ExchangeSelector(config.exchange, groups, model_config.num_experts)
        self._table = SequenceTable(
            config.scheduler.max_num_seqs, max_model_len, kv.block_size, device
        )
        self._sampler = Sampler(model_config.vocab_size, device)
        self._sequences: dict[int, NewSequence] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult | None:
        """Run one step; returns the DP group's result on its TP rank 0, unless it is idle."""
        layout = self._groups.layout
        group = plan.groups[layout.dp_rank]
        self._update_sequences(group)
        batch = self._table.build(group.steps)
        num_tokens = batch.token_ids_T.shape[0]
        step = ForwardContext(
            positions_T=batch.positions_T,
            batch=batch.paged,
            kv=self._kv,
            exchange=self._exchange.select(largest_group(plan.groups)),
            tp_token_counts=split_evenly(num_tokens, layout.attention_tp),
        )
        x_TH = self._model(batch.token_ids_T, step)
        result = StepResult(plan.step_id, layout.dp_rank)
        self._score_prompts(group, batch, x_TH, result)
        self._sample(group, batch, x_TH, result)
        return result if layout.tp_rank == 0 and group.steps else None

    def _update_sequences(self, group: GroupPlan) -> None:
        """Forget the retired sequences, then take in the admitted ones."""
        for seq_id in group.retired:
            del self._sequences[seq_id]
            self._table.retire(seq_id)
            self._sampler.retire(seq_id)
        for sequence in group.admitted:
            self._sequences[sequence.seq_id] = sequence
            self._table.admit(sequence)
            self._sampler.admit(sequence)

    def _sample(
        self, group: GroupPlan, batch: StepBatch, x_TH: torch.Tensor, result: StepResult
    ) -> None:
        """Sample on TP rank 0, tell the TP group, and keep the tokens for the next step."""
        chosen = [i for i, step in enumerate(group.steps) if step.uniform is not None]
        if not chosen:
            return
        logits_BV = self._model.logits(x_TH[self._rows(batch.last_rows[chosen])])
        rows = [self._sample_row(group.steps[i]) for i in chosen]
        tokens_B = torch.empty(len(chosen), dtype=torch.int64, device=self._device)
        if logits_BV is not None:
            tokens_B = self._sampler.sample(logits_BV, rows)
        tokens_B = self._groups.tp.broadcast(tokens_B)
        ends = [group.steps[i].start + group.steps[i].num_tokens for i in chosen]
        self._table.append_sampled(batch.slots[chosen], np.array(ends), tokens_B)
        if logits_BV is not None:
            logprobs = self._sampler.logprobs(logits_BV, tokens_B, rows)
            result.tokens.extend(
                SampledToken(row.seq_id, token, entry)
                for row, token, entry in zip(rows, tokens_B.tolist(), logprobs, strict=True)
            )

    def _sample_row(self, step: SequenceStep) -> SampleRow:
        num_known = step.start + step.num_tokens
        num_outputs = num_known - self._sequences[step.seq_id].num_prompt_tokens
        assert step.uniform is not None
        return SampleRow(step.seq_id, step.uniform, num_outputs)

    def _score_prompts(
        self, group: GroupPlan, batch: StepBatch, x_TH: torch.Tensor, result: StepResult
    ) -> None:
        """Log-probabilities of the prompt tokens that follow this step's prompt positions."""
        for index, step in enumerate(group.steps):
            sequence = self._sequences[step.seq_id]
            num_top = sequence.params.prompt_logprobs
            last = min(step.start + step.num_tokens, sequence.num_prompt_tokens - 1)
            if num_top is None or step.start >= last:
                continue
            first_row = batch.last_rows[index] - step.num_tokens + 1
            entries: list[Logprobs] = []
            for start in range(step.start, last, PROMPT_ROWS_AT_ONCE):
                stop = min(start + PROMPT_ROWS_AT_ONCE, last)
                rows = slice(first_row + start - step.start, first_row + stop - step.start)
                logits_RV = self._model.logits(x_TH[rows])
                if logits_RV is not None:
                    targets = torch.tensor(sequence.token_ids[start + 1 : stop + 1])
                    targets = targets.to(self._device)
                    entries += self._sampler.prompt_logprobs(logits_RV, targets, num_top)
            if entries:
                result.prompt_logprobs.append(PromptLogprobs(step.seq_id, step.start + 1, entries))

    def _rows(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(rows).to(self._device)
