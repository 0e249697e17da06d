"""Measures what a step takes on a GPU, before the KV cache takes the rest.

The largest step that the configuration allows is run once, on a KV cache of one block and with
nothing written to it. That also compiles and loads the kernels, so no request pays for it.

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
from moe_engine.dist.layout import split_evenly
from moe_engine.engine.decode import DecodeStep
from moe_engine.engine.graphs import capturable_buckets
from moe_engine.engine.sampler import Sampler, SampleRow
from moe_engine.engine.table import SequenceTable
from moe_engine.layers.context import ForwardContext
from moe_engine.models.qwen3_moe import Qwen3MoeForCausalLM
from moe_engine.ops.attention import PagedBatch, PrefillSpan
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import NewSequence

GRAPH_BYTES_PER_LAYER = 256 << 10
"""What the driver keeps for one layer of one captured graph, rounded up."""

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
        activations: of the largest step of any kind, sampling included.
        graphs: an estimate, from above, of what capturing the decode steps will take.
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
        self._exchange = ExchangeSelector(config.exchange, groups, model_config.num_experts)

    @torch.inference_mode()
    def measure(self, *, with_graphs: bool) -> StepMemory:
        """Run the largest steps and see how much the device's allocator has to reserve."""
        self._run_prefill()  # workspaces and compiled kernels come first, and stay
        torch.cuda.synchronize()
        activations = self._reserved_by(self._run_prefill)
        graphs = 0
        buckets = capturable_buckets(self._limits.max_num_seqs, self._exchange)
        if with_graphs and buckets:
            layers = self._model_config.num_hidden_layers
            graphs = self._reserved_by(lambda: self._run_decode(buckets[-1]))
            graphs += len(buckets) * layers * GRAPH_BYTES_PER_LAYER
        return StepMemory(activations, graphs)

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

    def _run_prefill(self) -> None:
        """Prompts that fill a step, then the hardest kind of sampling for all sequences."""
        table = self._new_table()  # the runner will have one
        num_tokens = self._limits.max_num_batched_tokens
        batch, positions = prefill_batch(num_tokens, self._max_model_len, self._kv, self._device)
        x_TH = self._forward(batch, positions)
        num_rows = min(self._limits.max_num_seqs, num_tokens)
        logits_RV = self._model.logits(x_TH[:num_rows])
        if logits_RV is not None:
            self._sample(logits_RV)
        del table

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
        decode.compute(num_rows, self._exchange.select(num_rows))

    def _new_table(self) -> SequenceTable:
        return SequenceTable(
            self._limits.max_num_seqs, self._max_model_len, self._kv.block_size, self._device
        )

    def _forward(self, batch: PagedBatch, positions_T: torch.Tensor) -> torch.Tensor:
        num_tokens = len(positions_T)
        step = ForwardContext(
            positions_T=positions_T,
            batch=batch,
            kv=self._kv,
            exchange=self._exchange.select(num_tokens),
            tp_token_counts=split_evenly(num_tokens, self._groups.layout.attention_tp),
        )
        x_TH: torch.Tensor = self._model(torch.zeros_like(positions_T), step)
        return x_TH


def prefill_batch(
    num_tokens: int, max_model_len: int, kv: KVCache, device: torch.device
) -> tuple[PagedBatch, torch.Tensor]:
    """Prompts of ``max_model_len`` tokens (the last one shorter), ``num_tokens`` in all.

    They read block 0 and nothing else, and write nothing. Returns also their int64 positions.
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
        slots_T=torch.full((num_tokens,), -1, dtype=torch.int64, device=device),
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
