"""Measures what a step takes on a GPU, before the KV cache takes the rest.

The largest step that the configuration allows is run once, on a KV cache of one block and with
nothing written to it. That also loads what libraries load when it is first used, and compiles the
kernels that `engine.precompile` has not, so no request pays for it.

Shape legend: T tokens of the step, R rows that need logits, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_engine.cache.kv import KVCache
from moe_engine.config import EngineConfig, ModelConfig
from moe_engine.dist.exchange import ExchangeSelector
from moe_engine.dist.groups import ParallelGroups
from moe_engine.engine.decode import Choice, DecodeStep
from moe_engine.engine.graphs import capturable_buckets
from moe_engine.engine.mixed import MixedSize, MixedStep, make_mixed_step
from moe_engine.engine.runner import PROMPT_ROWS_AT_ONCE
from moe_engine.engine.sampler import Sampler, SampleRow
from moe_engine.engine.sweep import step_batch
from moe_engine.engine.table import SequenceTable
from moe_engine.layers.context import ForwardContext
from moe_engine.models.qwen3_moe import Qwen3MoeForCausalLM
from moe_engine.ops.paged_batch import PagedBatch
from moe_engine.ops.prefill_plan import PrefillSpan
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import NewSequence

GRAPH_BYTES_PER_LAYER = 256 << 10
"""What the driver keeps for one layer of one captured graph, rounded up."""

GRAPH_WORKSPACE_BYTES = 160 << 20
"""What matrix libraries take anew for the stream on which graphs are captured, rounded up: in a
fresh process on an H200, small graphs and all this were 144 MiB."""

_HARDEST_SAMPLING = SamplingParams(
    temperature=1.0,
    top_k=50,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    logprobs=20,
)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes on top of weights and KV cache.

    Attributes:
        activations: of the largest step that is launched singly, sampling included; where all are
            graphs, of what follows them.
        graphs: an estimate, from above, of what capturing steps will take.
    """

    activations: int
    graphs: int


class StepProfiler:
    """Runs steps of nonsense through a rank's model; collective over the world.

    Args:
        kv: may be as small as one block.
        max_model_len: no sequence is made longer.
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
    ) -> None:
        self._limits = config.scheduler
        self._model_config = model_config
        self._model = model
        self._kv = kv
        self._groups = groups
        self._max_model_len = max_model_len
        self._device = device
        self._exchange = exchange

    @torch.inference_mode()
    def measure(self, *, with_graphs: bool) -> StepMemory:
        """Run the largest steps and see how much the device's allocator has to reserve."""
        size = self._limits.max_num_batched_tokens
        sizes = self._warm_up_mixed() if with_graphs else []
        most_captured = sizes[-1].num_rows if sizes else 0
        run = self._run_prefill if size > most_captured else self._run_behind_graph
        run(size)  # workspaces and loaded kernels stay
        for num_tokens in (size // 4, size // 16, size // 64):
            if num_tokens > most_captured:
                self._run_prefill(num_tokens)
        activations = self._reserved_by(lambda: run(size))
        buckets = capturable_buckets(self._limits.max_num_seqs, self._exchange)
        if not (with_graphs and buckets):
            self._run_decodes_singly(self._limits.max_num_seqs)
            return StepMemory(activations, graphs=0)
        self._run_decode(self._limits.max_num_seqs)
        pool = self._reserved_by(lambda: self._run_decode(buckets[-1]))
        # The smaller graphs use the memory of the largest.
        pool = max(pool, self._reserved_by(self._run_mixed))
        # Together the graphs that choose tokens have fewer kernels than as many layers.
        num_layers = self._model_config.num_hidden_layers + len(Choice)
        num_graphs = len(buckets) + len(sizes)
        graphs = num_graphs * num_layers * GRAPH_BYTES_PER_LAYER + GRAPH_WORKSPACE_BYTES
        return StepMemory(activations, pool + graphs)

    def _reserved_by(self, run: Callable[[], None]) -> int:
        """Bytes that the caching allocator has to reserve for ``run``."""
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved(self._device) - before
        torch.cuda.empty_cache()
        return peak

    def _run_prefill(self, num_tokens: int) -> None:
        """Prompts of so many tokens in all, and what follows them."""
        table = self._new_table()  # the runner will have one
        batch, positions = prefill_batch(num_tokens, self._max_model_len, self._kv, self._device)
        self._sample_and_score(self._forward(batch, positions))
        del table

    def _run_behind_graph(self, num_tokens: int) -> None:
        """What follows a step of so many tokens that is a graph."""
        table = self._new_table()
        weight_H = self._model.norm.weight
        self._sample_and_score(weight_H.new_zeros(num_tokens, len(weight_H)))
        del table

    def _sample_and_score(self, x_TH: torch.Tensor) -> None:
        """The hardest sampling and scoring there is."""
        logits_RV = self._model.logits(x_TH[: self._limits.max_num_seqs])
        if logits_RV is not None:
            self._sample(logits_RV)
            del logits_RV
        logits_RV = self._model.logits(x_TH[:PROMPT_ROWS_AT_ONCE])
        if logits_RV is not None:
            targets_R = torch.zeros(len(logits_RV), dtype=torch.int64, device=self._device)
            Sampler(logits_RV.shape[1], self._device).prompt_logprobs(logits_RV, targets_R, 20)

    def _sample(self, logits_RV: torch.Tensor) -> None:
        num_rows, vocab_size = logits_RV.shape
        sampler = Sampler(vocab_size, self._device)
        for seq_id in range(num_rows):
            sampler.admit(NewSequence(seq_id, [0], 1, _HARDEST_SAMPLING))
        rows = [SampleRow(seq_id, 0.5, 0) for seq_id in range(num_rows)]
        tokens_R = sampler.sample(logits_RV, rows)
        sampler.logprobs(logits_RV, tokens_R, range(num_rows))

    def _run_decode(self, num_rows: int) -> None:
        """A decode step of padding rows, with all its static memory."""
        decode = DecodeStep(
            self._model, self._kv, self._new_table(), self._groups, self._limits.max_num_seqs
        )
        decode.load([], [])
        logits = decode.compute(num_rows, self._exchange.select(num_rows))
        for choice in decode.choices:
            decode.choose(num_rows, logits, choice)

    def _run_decodes_singly(self, num_rows: int) -> None:
        """The same where nothing is captured, without static memory."""
        batch = step_batch(num_rows, [], self._kv.block_size, self._device)
        self._model.logits(self._forward(batch, torch.zeros_like(batch.slots_T)))

    def _warm_up_mixed(self) -> list[MixedSize]:
        """What has to be launched once for steps of any kind that will be captured.

        Returns:
            Their sizes, ascending; none if the model has no such step.
        """
        mixed = self._new_mixed()
        if mixed is None:
            return []
        mixed.warm_up(self._exchange)
        return mixed.sizes

    def _run_mixed(self) -> None:
        """The largest of them, of padding rows, with all its static memory."""
        mixed = self._new_mixed()
        if mixed is not None:
            largest = mixed.sizes[-1]
            mixed.compute(largest, self._exchange.select(largest.num_rows))

    def _new_mixed(self) -> MixedStep | None:
        return make_mixed_step(
            self._model,
            self._kv,
            self._new_table(),
            self._limits.max_num_batched_tokens,
            self._exchange,
        )

    def _new_table(self) -> SequenceTable:
        return SequenceTable(
            self._limits.max_num_seqs, self._max_model_len, self._kv.block_size, self._device
        )

    def _forward(self, batch: PagedBatch, positions_T: torch.Tensor) -> torch.Tensor:
        step = ForwardContext(
            positions_T=positions_T,
            batch=batch,
            kv=self._kv,
            exchange=self._exchange.select(len(positions_T)),
        )
        x_TH: torch.Tensor = self._model(torch.zeros_like(positions_T), step)
        return x_TH


def prefill_batch(
    num_tokens: int, max_model_len: int, kv: KVCache, device: torch.device
) -> tuple[PagedBatch, torch.Tensor]:
    """Prompts of ``max_model_len`` tokens (the last one shorter), ``num_tokens`` in all.

    All of them read block 0 and write to its first slot. Returns also their int64 positions.
    """
    firsts = list(range(0, num_tokens, max_model_len))
    spans = [(first, min(max_model_len, num_tokens - first)) for first in firsts]
    num_decodes = sum(length == 1 for _, length in spans)  # the last prompt at most
    spans.sort(key=lambda span: span[1] > 1)
    starts = [0]
    for _, length in spans:
        starts.append(starts[-1] + length)
    contexts = [length for _, length in spans]
    num_blocks = -(-max(contexts) // kv.block_size)
    batch = PagedBatch(
        slots_T=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        block_tables_SB=torch.zeros(len(spans), num_blocks, dtype=torch.int32, device=device),
        context_lens_S=torch.tensor(contexts, dtype=torch.int32, device=device),
        query_starts_S=torch.tensor(starts, dtype=torch.int32, device=device),
        num_decodes=num_decodes,
        prefills=tuple(
            PrefillSpan(start, length, length)
            for start, length in zip(starts, contexts, strict=False)
        )[num_decodes:],
    )
    positions = torch.cat([torch.arange(length) for length in contexts])
    return batch, positions.to(device)
