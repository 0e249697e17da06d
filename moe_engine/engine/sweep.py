"""Steps that together launch every variant of every kernel that serving can launch.

They are for `moe_engine.kernels.launch.compile_only`: Triton's kernels are compiled instead of run.
What a step computes then means nothing, and what indexes memory with it is left out
(`ops.hopper`). A kernel has at most one variant for each power of two of some size, so sizes that
double meet all of them. Where all decode, choices of two tables come together, the projection's
and the attention's, whose limits lie closer (`fine_sizes`). All layers of a kind are alike, so few
will do.

Shape legend: T tokens of a step, S sequences, B blocks, H hidden size, R rows, K experts per token,
V vocabulary.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from moe_engine.cache.kv import KVCache
from moe_engine.config import EngineConfig, ModelConfig
from moe_engine.dist.exchange import ExchangeSelector
from moe_engine.dist.groups import ParallelGroups
from moe_engine.dist.layout import split_evenly
from moe_engine.engine.decode import DecodeStep
from moe_engine.engine.graphs import capturable_buckets
from moe_engine.engine.mixed import MixedStep, make_mixed_step
from moe_engine.engine.table import SequenceTable
from moe_engine.layers.context import ForwardContext
from moe_engine.layers.moe import SparseMoE
from moe_engine.models.qwen3_moe import Qwen3MoeForCausalLM
from moe_engine.ops.moe import expert_ffn, group_by_expert, summed
from moe_engine.ops.paged_batch import NeededRows, PagedBatch
from moe_engine.ops.prefill_plan import PrefillSpan
from moe_engine.ops.sampling import (
    greedy_tokens,
    params_device,
    sample_tokens,
    to_float32_without_nan,
)

EXPERT_ROWS = 4096
"""Rows beyond which neither a layer's experts nor their sum has another variant."""


class StepSweep:
    """Steps that together launch every variant of a kernel; a collective over the world.

    Args:
        kv: may be as small as one block.
        max_model_len: no sequence is longer.
        with_graphs: also the steps that CUDA graphs will hold.
    """

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
        *,
        with_graphs: bool,
    ) -> None:
        self._limits = config.scheduler
        self._model_config = model_config
        self._model = model.shortened()
        self._kv = kv
        self._groups = groups
        self._max_model_len = max_model_len
        self._device = device
        self._with_graphs = with_graphs
        self._exchange = exchange

    def __call__(self) -> None:
        """Run all of them."""
        max_seqs = self._limits.max_num_seqs
        # The slowest to compile come first.
        self._sample(max_seqs)
        mixed = None
        if self._with_graphs:
            self._decode(max_seqs)
            mixed = self._mixed(max_seqs)
        self._launch_singly(mixed)
        if self._groups.layout.world_size > 1:
            self._run_experts()

    def _sample(self, max_rows: int) -> None:
        """Greedy and drawn tokens, of the model's logits and of those that were adjusted."""
        hidden = self._model_config.hidden_size
        x_RH = self._model.norm.weight.new_zeros(max_rows, hidden)
        raw_RV = self._model.logits(x_RH)
        if raw_RV is None:
            return
        for logits_RV in (raw_RV, to_float32_without_nan(raw_RV)):
            for num_rows in doubling_sizes(max_rows):
                params_5R = torch.zeros(
                    5, num_rows, dtype=torch.float64, device=params_device(self._device)
                )
                for may_filter in (True, False):
                    sample_tokens(logits_RV[:num_rows], params_5R, may_filter=may_filter)
                greedy_tokens(logits_RV[:num_rows])

    def _decode(self, max_rows: int) -> None:
        """Steps in which all decode, in static memory, of each size that will be captured."""
        table = SequenceTable(max_rows, self._max_model_len, self._kv.block_size, self._device)
        decode = DecodeStep(self._model, self._kv, table, self._groups, max_rows)
        decode.load([], [])
        for num_rows in capturable_buckets(max_rows, self._exchange):
            decode.warm_up(num_rows, self._exchange.select(num_rows))

    def _mixed(self, max_seqs: int) -> MixedStep | None:
        """Steps of any kind in static memory, of each size that will be captured."""
        table = SequenceTable(max_seqs, self._max_model_len, self._kv.block_size, self._device)
        max_tokens = self._limits.max_num_batched_tokens
        mixed = make_mixed_step(self._model, self._kv, table, max_tokens, self._exchange)
        if mixed is not None:
            mixed.warm_up(self._exchange)
        return mixed

    def _launch_singly(self, mixed: MixedStep | None) -> None:
        """Steps of any kind that are too large for all sizes of ``mixed``."""
        max_tokens, max_seqs = self._limits.max_num_batched_tokens, self._limits.max_num_seqs
        most_captured = 0 if mixed is None else mixed.sizes[-1].num_rows
        for num_tokens in doubling_sizes(max_tokens):
            if num_tokens > most_captured:
                self._compose(num_tokens, max_seqs)
        for num_decodes in fine_sizes(max_seqs):
            if num_decodes > most_captured:
                self._compute(num_decodes, [])
        if 0 < most_captured < max_tokens:
            # No smaller step without a graph has varied the numbers of sequences and scored rows.
            smallest = most_captured + 1
            for num_seqs in doubling_sizes(max_seqs):
                self._compose(smallest, num_seqs)
            for num_scored in doubling_sizes(smallest):
                self._compute(0, [smallest], num_scored)

    def _compose(self, num_tokens: int, max_seqs: int) -> None:
        """All `compositions`."""
        for num_decodes, span_lens in compositions(num_tokens, max_seqs):
            self._compute(num_decodes, span_lens)

    def _compute(self, num_decodes: int, span_lens: list[int], num_scored: int = 0) -> None:
        """A step of any kind, of which the logits of some rows are needed.

        Args:
            num_scored: that many rows, the first, as if a prompt were scored; 0: the last row of
                every sequence, or where all decode all rows as they are.
        """
        num_tokens = num_decodes + sum(span_lens)
        zeros_T = torch.zeros(num_tokens, dtype=torch.int64, device=self._device)
        batch = step_batch(num_decodes, span_lens, self._kv.block_size, self._device)
        num_sequences = num_decodes + len(span_lens)
        needed = None
        if num_scored:
            needed = NeededRows(torch.arange(num_scored, device=self._device), as_decodes=None)
        elif span_lens:
            ends_S = (batch.query_starts_S[1:] - 1).to(torch.int64)
            decodes = step_batch(num_sequences, [], self._kv.block_size, self._device)
            needed = NeededRows(ends_S, as_decodes=decodes)
        step = ForwardContext(
            positions_T=zeros_T,
            batch=batch,
            kv=self._kv,
            exchange=self._exchange.select(num_tokens),
        )
        self._model(zeros_T, step, needed)

    def _run_experts(self) -> None:
        """As many rows as the exchange can bring, which no step above does for sure."""
        layers = (layer.mlp for layer in self._model.layers)
        moe = next(mlp for mlp in layers if isinstance(mlp, SparseMoE))
        num_experts, hidden = moe.down.shape[:2]
        top_k = self._model_config.num_experts_per_tok
        max_rows = self._limits.max_num_batched_tokens * self._groups.layout.attention_dp
        for num_rows in doubling_sizes(max_rows):
            ids_RK = torch.zeros(num_rows, top_k, dtype=torch.int32, device=self._device)
            group_by_expert(ids_RK, num_experts)
            if num_rows <= EXPERT_ROWS:
                x_RH = moe.down.new_zeros(num_rows, hidden)
                weights_RK = torch.zeros_like(ids_RK, dtype=torch.float32)
                summed(expert_ffn(x_RH, ids_RK, weights_RK, moe.gate_up, moe.down))


def doubling_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8 and so on below ``largest``, and ``largest``."""
    return [1 << power for power in range((largest - 1).bit_length())] + [largest]


def fine_sizes(largest: int) -> list[int]:
    """Four sizes in each octave, and ``largest``: between any two limits of the tables lies one.

    Example: ``fine_sizes(21) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 21]``.
    """
    powers = (1 << power for power in range((largest - 1).bit_length()))
    sizes = {power * quarters // 4 for power in powers for quarters in (4, 5, 6, 7)}
    return sorted(size for size in sizes | {largest} if size <= largest)


def compositions(num_tokens: int, max_num_seqs: int) -> list[tuple[int, list[int]]]:
    """Steps of ``num_tokens``: how many decodes, and the lengths of as many prompts as can be.

    Prompts alone, prompts and one decode, prompts and decodes, one prompt and as many decodes as
    can be, as far as there are enough sequences; a prompt has two tokens or more.

    Example: 9 tokens of up to 4 sequences:
    ``[(0, [3, 2, 2, 2]), (1, [3, 3, 2]), (2, [4, 3]), (3, [6])]``.
    """
    steps = []
    most = max(0, min(num_tokens - 2, max_num_seqs - 1))
    half = min(num_tokens, max_num_seqs) // 2
    for num_decodes in sorted({0, 1, half, most}):
        rest = num_tokens - num_decodes
        num_prompts = min(rest // 2, max_num_seqs - num_decodes)
        if num_prompts > 0:
            steps.append((num_decodes, split_evenly(rest, num_prompts)))
    return steps


def step_batch(
    num_decodes: int, span_lens: list[int], block_size: int, device: torch.device
) -> PagedBatch:
    """Decodes, then prompts with one token computed before; all of them read and write block 0."""
    query_lens = [1] * num_decodes + span_lens
    contexts = [1] * num_decodes + [length + 1 for length in span_lens]
    starts = list(accumulate(query_lens, initial=0))
    num_blocks = -(-max(contexts) // block_size)
    return PagedBatch(
        slots_T=torch.zeros(starts[-1], dtype=torch.int64, device=device),
        block_tables_SB=torch.zeros(len(contexts), num_blocks, dtype=torch.int32, device=device),
        context_lens_S=torch.tensor(contexts, dtype=torch.int32, device=device),
        query_starts_S=torch.tensor(starts, dtype=torch.int32, device=device),
        num_decodes=num_decodes,
        prefills=tuple(
            PrefillSpan(start, length, length + 1)
            for start, length in zip(starts[num_decodes:], span_lens, strict=False)
        ),
    )
