"""One rank's share of the engine: join the world, load the model, then execute plans."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from moe_engine.cache.kv import KVCache
from moe_engine.checkpoint.dummy import fill_dummy
from moe_engine.checkpoint.load import load_weights
from moe_engine.checkpoint.reader import Checkpoint
from moe_engine.checkpoint.skew import skew_routers
from moe_engine.config import EngineConfig, ModelConfig
from moe_engine.config.hf import load_model_config
from moe_engine.dist.exchange import ExchangeSelector, tokens_of_a_rank
from moe_engine.dist.exchange.domain import ExchangeShape, NvlinkDomain, join_domain
from moe_engine.dist.exchange.group import PacketCommunicator, rows_by_packets
from moe_engine.dist.groups import ParallelGroups, create_groups
from moe_engine.dist.layout import RankLayout, check_layout
from moe_engine.dist.topology import from_file
from moe_engine.engine import memory
from moe_engine.engine.mixed import most_rows
from moe_engine.engine.precompile import Precompilation, num_compile_threads
from moe_engine.engine.profiling import StepMemory, StepProfiler
from moe_engine.engine.runner import ModelRunner
from moe_engine.engine.startup import StartupClock
from moe_engine.engine.sweep import StepSweep
from moe_engine.errors import ConfigError
from moe_engine.layers.attention import local_kv_heads
from moe_engine.layers.context import LayerContext
from moe_engine.models.qwen3_moe import Qwen3MoeForCausalLM
from moe_engine.ops import native
from moe_engine.types.messages import MemoryLedger

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much of it is done, and the whole."""


CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class LocalPlace:
    """Where this rank stands on its machine."""

    local_rank: int
    local_world_size: int


class RankRuntime:
    """Owns everything that a rank allocates.

    Construct, `load`, then `start` with the number of KV blocks that all ranks agreed on; after
    that, `runner` executes plans. ``clock`` is told of every phase.

    Attributes:
        ledger: where the memory went, once started.
    """

    runner: ModelRunner
    ledger: MemoryLedger

    def __init__(
        self,
        config: EngineConfig,
        layout: RankLayout,
        place: LocalPlace,
        clock: StartupClock | None = None,
    ) -> None:
        assert config.model is not None
        self.config = config
        self.layout = layout
        self.clock = clock or StartupClock(time.perf_counter())
        self._place = place
        self.model_config: ModelConfig = load_model_config(Path(config.model))
        check_layout(self.model_config, config.parallel)
        self.device = pick_device(config.device, place)
        self.dtype = pick_dtype(config.dtype, self.model_config, self.device)
        self.max_model_len = pick_max_model_len(config, self.model_config)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._steps = StepMemory(activations=0, graphs=0)
        # Before `join`, for which all ranks wait, none of them has taken memory for weights.
        self._free_at_start, _ = self._memory()
        self.clock.mark("device")

    def join(self, store: dist.Store) -> None:
        """Make the process groups (a collective over all ranks)."""
        self.groups: ParallelGroups = create_groups(
            self.layout, store, self.device, self.config.step_timeout
        )
        self.clock.mark("groups")

    def load(self, progress: Progress) -> int:
        """Build the model, fill its weights, and return how many KV blocks fit this rank.

        Raises:
            ConfigError: too little memory, with the arithmetic.
            CheckpointError: tensors missing, extra, mis-shaped or truncated.
        """
        needed = memory.weight_bytes(self.model_config, self.config, self.dtype)
        ranks_here = self._place.local_world_size if self.device.type == "cpu" else 1
        memory.check_weights_fit(needed, self._free_at_start, ranks_here)
        self.exchange = self._make_exchange()
        context = LayerContext(self.model_config, self.groups, self.dtype, self.device)
        self._model = Qwen3MoeForCausalLM(context)
        specs = list(self._model.weight_specs())
        self.clock.mark("model")
        compiling = self._start_compiling()
        if self.config.load_format == "dummy":
            fill_dummy(specs, self.config.seed)
            if self.config.dummy_expert_skew:
                top_k = self.model_config.num_experts_per_tok
                skew_routers(specs, top_k, self.config.dummy_expert_skew, self.config.seed)
        else:
            assert self.config.model is not None
            load_weights(
                specs,
                Checkpoint(Path(self.config.model), self.model_config),
                lambda done, total: progress("loading weights", done, total),
                show_progress=self.layout.rank == 0,
            )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.clock.mark("weights")
        if self.device.type == "cuda":
            progress("warming up", 0, 1)
            if compiling is not None:
                compiling.wait()
                self.clock.mark("kernels")
            self._meet()
            self._steps = self._measure_steps()
            self._meet()
            self.clock.mark("warm-up")
        free, total = self._memory()
        self.budget = memory.kv_budget(
            self.model_config,
            self.config,
            self.dtype,
            free // ranks_here,
            total,
            self._steps.activations + self._steps.graphs,
        )
        return memory.choose_num_blocks(self.budget, self.config, self.max_model_len)

    def start(self, num_blocks: int) -> None:
        """Allocate the KV cache and get ready to execute plans."""
        kv = self._kv_cache(num_blocks)
        self.clock.mark("KV cache")
        self.runner = ModelRunner(
            self.config,
            self.model_config,
            self._model,
            kv,
            self.groups,
            self.exchange,
            self.max_model_len,
            self.device,
        )
        graphs = self._capture_graphs() if self.uses_graphs else 0
        self.clock.mark("CUDA graphs" if self.uses_graphs else "runner")
        free, total = self._memory()
        self.ledger = MemoryLedger(
            total=total,
            at_start=total - self._free_at_start if total else 0,
            weights=memory.weight_bytes(self.model_config, self.config, self.dtype),
            activations=self._steps.activations,
            graphs_reserved=self._steps.graphs,
            graphs=graphs,
            exchange=self.exchange.num_bytes,
            kv_cache=num_blocks * self.budget.block_bytes,
            free=free,
        )

    @property
    def pipeline_depth(self) -> int:
        """Steps that may be launched before the oldest has answered."""
        configured = self.config.scheduler.pipeline_depth
        return configured or (2 if self.device.type == "cuda" else 1)

    @property
    def uses_graphs(self) -> bool:
        """Whether steps are CUDA graphs; only compiled kernels can be captured."""
        return self.config.cuda_graphs and self.device.type == "cuda" and native.has_triton()

    def _make_exchange(self) -> ExchangeSelector:
        """The backends that steps may use, and the memory that they share (a collective)."""
        domain = None
        if self.config.exchange.exchange == "nvlink":
            domain = self._join_domain(self._exchange_shape())
            if self.layout.attention_tp > 1:
                ranks = self.layout.group_ranks(self.layout.dp_rank)
                tp = PacketCommunicator(self.groups.tp, domain, ranks)
                self.groups = replace(self.groups, tp=tp)
        return ExchangeSelector(
            self.config.exchange, self.groups, self.model_config.num_experts, domain
        )

    def _exchange_shape(self) -> ExchangeShape:
        model, tp = self.model_config, self.layout.attention_tp
        most_tokens = most_rows(self.config.scheduler.max_num_batched_tokens)
        row_bytes = model.hidden_size * self.dtype.itemsize
        return ExchangeShape(
            num_ranks=self.layout.world_size,
            num_experts=model.num_experts,
            top_k=model.num_experts_per_tok,
            hidden=model.hidden_size,
            dtype=self.dtype,
            max_tokens=tokens_of_a_rank(most_tokens, tp),
            reduced_rows=min(most_tokens, rows_by_packets(tp, row_bytes)),
        ).with_measured_limits(self.device)

    def _join_domain(self, shape: ExchangeShape) -> NvlinkDomain:
        path, timeout = self.config.cluster.topology, self.config.exchange.exchange_timeout
        topology = None if path is None else from_file(Path(path), shape.num_ranks)
        if self.config.exchange.in_network_reduction:
            most = most_rows(self.config.scheduler.max_num_batched_tokens)
            shape = replace(shape, multicast_rows=most)
        return join_domain(shape, self.groups.ep, self.device, timeout, topology)

    def _meet(self) -> None:
        """Where ranks wait for each other's exchanges, let none begin or go on much before others.

        Raises:
            ExchangeTimeout: the exchanges before it were not complete.
        """
        torch.cuda.synchronize(self.device)
        self.exchange.check()
        if self.exchange.num_bytes:
            self.groups.ep.meet()

    def _start_compiling(self) -> Precompilation | None:
        """Compile, in the background, whatever serving will launch (a collective)."""
        if self.device.type != "cuda" or not native.has_triton():
            return None
        sweep = StepSweep(
            self.config,
            self.model_config,
            self._model,
            self._kv_cache(1),
            self.groups,
            self.exchange,
            self.max_model_len,
            self.device,
            with_graphs=self.uses_graphs,
        )
        return Precompilation(
            sweep,
            self.device,
            is_collective=self.layout.world_size > 1,
            num_threads=num_compile_threads(self._place.local_world_size),
        )

    def _measure_steps(self) -> StepMemory:
        """Run the largest steps once, on a KV cache of one block."""
        profiler = StepProfiler(
            self.config,
            self.model_config,
            self._model,
            self._kv_cache(1),
            self.groups,
            self.exchange,
            self.max_model_len,
            self.device,
        )
        return profiler.measure(with_graphs=self.uses_graphs)

    def _capture_graphs(self) -> int:
        """Capture steps; returns the bytes that it took."""
        free, _ = self._memory()
        self._meet()
        self.runner.capture_graphs()
        self._meet()
        torch.cuda.empty_cache()
        return free - self._memory()[0]

    def _kv_cache(self, num_blocks: int) -> KVCache:
        heads = local_kv_heads(self.model_config, self.layout.attention_tp, self.layout.tp_rank)
        return KVCache(
            self.model_config.num_hidden_layers,
            num_blocks,
            self.config.cache.block_size,
            len(heads),
            self.model_config.head_dim,
            self.dtype,
            self.device,
        )

    def _memory(self) -> tuple[int, int]:
        """(free bytes for this machine's ranks, total bytes of the GPU or 0 on a CPU)."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return free, total
        return available_host_memory(), 0


def available_host_memory() -> int:
    """Bytes that new processes can take without swapping, within the container's limit if any.

    Sources: Linux's ``/proc/meminfo``, and control group v2's ``memory.max``, ``memory.current``
    and ``memory.stat`` (file pages that the kernel can drop count as available).
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        used = int((CONTROL_GROUP / "memory.current").read_text())
        stat = dict(
            line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines()
        )
        used -= int(stat.get("inactive_file", 0))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return available
    return min(available, limit - used)


def pick_device(wanted: str, place: LocalPlace) -> torch.device:
    """``auto`` takes the local rank's GPU if there is a GPU at all.

    Raises:
        ConfigError: this machine has fewer GPUs than ranks.
    """
    num_gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if place.local_world_size > num_gpus:
        number = place.local_world_size
        ranks = "1 rank needs" if number == 1 else f"{number} ranks need"
        raise ConfigError(
            f"{ranks} a GPU each, and this machine has {num_gpus}; use fewer ranks or device cpu"
        )
    return torch.device("cuda", place.local_rank)


def pick_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """The context length served; `ConfigError` if it is longer than the model's."""
    wanted, longest = config.scheduler.max_model_len, model.max_position_embeddings
    if wanted is not None and wanted > longest:
        raise ConfigError(f"max_model_len is {wanted}, but the model's context is {longest} tokens")
    return wanted or longest


def pick_dtype(wanted: str, model: ModelConfig, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU and the checkpoint's dtype on a GPU."""
    if wanted == "auto":
        wanted = "float32" if device.type == "cpu" else model.dtype
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype
