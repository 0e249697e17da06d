"""Launches step plans on one rank: model, KV cache, sequence table and sampler.

On a GPU nothing here waits for the device: a step is enqueued, its results are on their way to
pinned memory, and `PendingStep.result` is where somebody waits.

Shape legend: T tokens of the step, R rows that need logits, P of them those that score a prompt,
B sequences that sample, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_engine.cache.kv import KVCache
from moe_engine.config import EngineConfig, ModelConfig
from moe_engine.dist.exchange import ExchangeSelector
from moe_engine.dist.groups import ParallelGroups
from moe_engine.engine.batch import StepBatch, build_batch, largest_group
from moe_engine.engine.decode import Choice, DecodeStep
from moe_engine.engine.graphs import DecodeGraphs, MixedGraphs
from moe_engine.engine.mixed import MixedSize, make_mixed_step
from moe_engine.engine.pending import PendingLogprobs, PendingStep, to_host
from moe_engine.engine.sampler import Sampler, SampleRow
from moe_engine.engine.table import SequenceTable
from moe_engine.layers.context import ForwardContext
from moe_engine.models.qwen3_moe import Qwen3MoeForCausalLM
from moe_engine.ops.sampling import greedy_tokens
from moe_engine.ops.transfer import stage
from moe_engine.types.step import GroupPlan, NewSequence, SequenceStep, StepPlan

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
        exchange: ExchangeSelector,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._max_num_seqs = config.scheduler.max_num_seqs
        self._max_num_tokens = config.scheduler.max_num_batched_tokens
        self._model = model
        self._kv = kv
        self._groups = groups
        self._device = device
        self._exchange = exchange
        self._table = SequenceTable(self._max_num_seqs, max_model_len, kv.block_size, device)
        self._sampler = Sampler(model_config.vocab_size, device)
        self._sequences: dict[int, NewSequence] = {}
        self._decode: DecodeStep | None = None
        self._graphs: DecodeGraphs | None = None
        self._mixed_graphs: MixedGraphs | None = None

    def capture_graphs(self) -> None:
        """Capture steps as CUDA graphs, which `launch` replays from then on.

        A collective over the world; between steps only.
        """
        pool = torch.cuda.graph_pool_handle()
        self.capture_mixed_graphs(pool)
        self.capture_decode_graphs(pool=pool)

    def capture_mixed_graphs(self, pool: Any = None) -> None:
        """Capture steps of any kind, anew if they have been before; none if the model has no such.

        A collective over the world; between steps only.

        Args:
            pool: None: a new one.
        """
        mixed = make_mixed_step(
            self._model, self._kv, self._table, self._max_num_tokens, self._exchange
        )
        if mixed is not None:
            self._mixed_graphs = MixedGraphs(mixed, self._exchange)
            self._mixed_graphs.capture(pool or torch.cuda.graph_pool_handle())

    def capture_decode_graphs(self, sizes: list[int] | None = None, pool: Any = None) -> None:
        """Capture decode steps, anew if they have been before.

        A collective over the world; between steps only.

        Args:
            sizes: see `DecodeGraphs`.
            pool: None: a new one.
        """
        self._decode = DecodeStep(
            self._model, self._kv, self._table, self._groups, self._max_num_seqs
        )
        self._graphs = DecodeGraphs(self._decode, self._exchange, sizes)
        self._graphs.capture(pool or torch.cuda.graph_pool_handle())

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Enqueue one step; on a CPU, run it."""
        layout = self._groups.layout
        group = plan.groups[layout.dp_rank]
        self._update_sequences(group)
        slots = self._table.advance(group.steps)
        is_reported = layout.tp_rank == 0 and bool(group.steps)
        pending = PendingStep(plan.step_id, layout.dp_rank, is_reported, check=self._exchange.check)
        size = self._decode_size(plan)
        if size is not None:
            self._replay(size, group.steps, slots, pending)
        else:
            self._compute(plan, group, slots, pending)
        if self._device.type == "cuda":
            pending.done = torch.cuda.Event()
            pending.done.record()
        return pending

    def _update_sequences(self, group: GroupPlan) -> None:
        """Forget the retired sequences, then take in the admitted ones."""
        for seq_id in group.retired:
            del self._sequences[seq_id]
            self._table.retire(seq_id)
            self._sampler.retire(seq_id)
        for sequence in group.admitted:
            self._sequences[sequence.seq_id] = sequence
            self._sampler.admit(sequence)
        self._table.admit(group.admitted)

    def _decode_size(self, plan: StepPlan) -> int | None:
        """The graph for a step in which everybody decodes, the same on every rank.

        A DP group with nothing to do replays it, too: the others' experts are on its ranks.
        """
        steps = [step for group in plan.groups for step in group.steps]
        if self._graphs is None or not steps:
            return None
        if any(step.num_tokens != 1 or step.uniform is None for step in steps):
            return None
        return self._graphs.pick(max(len(group.steps) for group in plan.groups))

    def _replay(
        self, size: int, steps: list[SequenceStep], slots: list[int], pending: PendingStep
    ) -> None:
        """A step in which everybody decodes, as a CUDA graph."""
        assert self._decode is not None
        assert self._graphs is not None
        seq_ids = [step.seq_id for step in steps]
        choice = self._choice(seq_ids)
        # All transfers come first: one between two graphs would hold up the device.
        self._decode.load(slots, [step.start for step in steps])
        if choice in (Choice.DRAW, Choice.FILTER_AND_DRAW):
            uniforms = [step.uniform for step in steps if step.uniform is not None]
            self._decode.load_draw(self._sampler.draw_params(seq_ids, uniforms))
        logits_SV = self._graphs.replay(size)
        if not steps:
            return
        tokens_B = self._decode.tokens(len(steps))
        logits_BV = None if logits_SV is None else logits_SV[: len(steps)]
        if choice is not None:
            self._graphs.choose(size, choice)
        else:
            if logits_BV is not None:
                tokens_B = self._sampler.sample(logits_BV, self._sample_rows(steps))
            self._decode.append(tokens_B)
        self._send_tokens(logits_BV, tokens_B, steps, pending)

    def _choice(self, seq_ids: list[int]) -> Choice | None:
        """The least that gives all of them what they ask for, None if only the sampler does.

        The same on every rank of the TP group.
        """
        assert self._decode is not None
        if self._sampler.is_argmax(seq_ids):
            choice = Choice.MOST_LIKELY
        elif not self._sampler.is_plain(seq_ids):
            return None
        elif self._sampler.filters(seq_ids):
            choice = Choice.FILTER_AND_DRAW
        else:
            choice = Choice.DRAW
        return choice if choice in self._decode.choices else None

    def _compute(
        self, plan: StepPlan, group: GroupPlan, slots: list[int], pending: PendingStep
    ) -> None:
        """A step of any kind."""
        num_scored = [self._num_scored(step) for step in group.steps]
        size = self._mixed_size(plan)
        batch = build_batch(self._table, group.steps, slots, num_scored, in_full=size is not None)
        x_RH = self._hidden_states(plan, group, batch, size)
        first_sampled = sum(num_scored)
        self._score_prompts(group, num_scored, x_RH[:first_sampled], pending)
        self._sample(group, slots, x_RH[first_sampled:], pending)

    def _mixed_size(self, plan: StepPlan) -> MixedSize | None:
        """The graph for a step of any kind, the same on every rank; None if a DP group is idle."""
        if self._mixed_graphs is None or not all(group.steps for group in plan.groups):
            return None
        num_decodes = max(
            sum(step.num_tokens == 1 for step in group.steps) for group in plan.groups
        )
        return self._mixed_graphs.pick(largest_group(plan.groups), num_decodes)

    def _hidden_states(
        self, plan: StepPlan, group: GroupPlan, batch: StepBatch, size: MixedSize | None
    ) -> torch.Tensor:
        """The final ones [R, H] of the rows needed, by the CUDA graph of ``size`` if there is."""
        if size is not None:
            assert self._mixed_graphs is not None
            x_TH = self._mixed_graphs.run(size, batch)
            if batch.needed is None:
                return x_TH[: group.num_tokens]
            return x_TH.index_select(0, batch.needed.rows_R)
        step = ForwardContext(
            positions_T=batch.positions_T,
            batch=batch.paged,
            kv=self._kv,
            exchange=self._exchange.select(largest_group(plan.groups)),
        )
        x_RH: torch.Tensor = self._model(batch.token_ids_T, step, batch.needed)
        return x_RH

    def _num_scored(self, step: SequenceStep) -> int:
        """How many of a step's positions, the first ones, have logits that score the prompt."""
        sequence = self._sequences[step.seq_id]
        if sequence.params.prompt_logprobs is None:
            return 0
        return max(0, min(step.end, sequence.num_prompt_tokens - 1) - step.start)

    def _sample(
        self, group: GroupPlan, slots: list[int], x_BH: torch.Tensor, pending: PendingStep
    ) -> None:
        """Sample on TP rank 0, tell the TP group, and keep the tokens for the next step."""
        chosen = [i for i, step in enumerate(group.steps) if step.uniform is not None]
        if not chosen:
            return
        steps = [group.steps[i] for i in chosen]
        longest = self._table.tokens_NC.shape[1]
        places = [slots[i] * longest + group.steps[i].end for i in chosen]
        [places_B] = stage([places], self._device, torch.int64)
        logits_BV = self._model.logits(x_BH)
        if logits_BV is None:
            tokens_B = torch.empty(len(steps), dtype=torch.int64, device=self._device)
        elif self._sampler.is_argmax(step.seq_id for step in steps):
            tokens_B = greedy_tokens(logits_BV)
        else:
            tokens_B = self._sampler.sample(logits_BV, self._sample_rows(steps))
        tokens_B = self._groups.tp.broadcast(tokens_B)
        self._table.tokens_NC.view(-1).index_copy_(0, places_B, tokens_B.to(torch.int32))
        self._send_tokens(logits_BV, tokens_B, steps, pending)

    def _send_tokens(
        self,
        logits_BV: torch.Tensor | None,
        tokens_B: torch.Tensor,
        steps: list[SequenceStep],
        pending: PendingStep,
    ) -> None:
        """Send the sampled tokens and their log-probabilities to the host, from TP rank 0."""
        if logits_BV is None:
            return
        pending.seq_ids = [step.seq_id for step in steps]
        pending.tokens = to_host(tokens_B)
        pending.logprobs = self._sampler.logprobs(logits_BV, tokens_B, pending.seq_ids)

    def _sample_rows(self, steps: list[SequenceStep]) -> list[SampleRow]:
        rows = []
        for step in steps:
            assert step.uniform is not None
            num_outputs = step.end - self._sequences[step.seq_id].num_prompt_tokens
            rows.append(SampleRow(step.seq_id, step.uniform, num_outputs))
        return rows

    def _score_prompts(
        self,
        group: GroupPlan,
        num_scored: list[int],
        x_RH: torch.Tensor,
        pending: PendingStep,
    ) -> None:
        """Log-probabilities of the prompt tokens that follow this step's prompt positions."""
        parts = x_RH.split(num_scored)
        for step, x_PH in zip(group.steps, parts, strict=True):
            sequence = self._sequences[step.seq_id]
            num_top = sequence.params.prompt_logprobs
            targets_P = sequence.token_ids[step.start + 1 : step.start + 1 + len(x_PH)]
            pieces: list[PendingLogprobs] = []
            for first in range(0, len(x_PH), PROMPT_ROWS_AT_ONCE):
                rows = slice(first, first + PROMPT_ROWS_AT_ONCE)
                logits_RV = self._model.logits(x_PH[rows])
                if logits_RV is not None:
                    assert num_top is not None
                    [targets] = stage([targets_P[rows]], self._device)
                    targets_R = targets.to(torch.int64)
                    pieces.append(self._sampler.prompt_logprobs(logits_RV, targets_R, num_top))
            if pieces:
                pending.prompt_logprobs.append((step.seq_id, step.start + 1, pieces))
