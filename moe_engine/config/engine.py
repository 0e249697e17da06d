"""The engine's and the server's configuration.

Every field carries its help text, so that YAML files, command-line flags and keyword arguments of
`MoEEngine` are one list: `config.flat` reads these dataclasses, nothing repeats them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moe_engine.errors import ConfigError

GIB = 1 << 30
MAX_EXPERT_SKEW = 4.0
DEMO_MODEL_NAME = "moe-engine-demo"
"""What clients call the embedded checkpoint."""


def option(
    default: Any,
    help_text: str,
    choices: tuple[str, ...] | None = None,
    *,
    is_bytes: bool = False,
) -> Any:
    """A dataclass field with a help text and, for strings, the values allowed.

    ``is_bytes`` marks a size in bytes, which may also be written like ``4GiB``.
    """
    metadata = {"help": help_text, "choices": choices, "is_bytes": is_bytes}
    return field(default=default, metadata=metadata)


def check_options(config: Any) -> None:
    """Raise `ConfigError` if a field with ``choices`` holds another value."""
    for name, info in config.__dataclass_fields__.items():
        choices = info.metadata.get("choices")
        value = getattr(config, name)
        if choices and value not in choices:
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def check_at_least(config: Any, minimum: int, *names: str) -> None:
    """Raise `ConfigError` if a named integer field is set and below ``minimum``."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ConfigError(f"{name} is {value}; it must be at least {minimum}")


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How one replica is laid over ranks: world = attention_tp × attention_dp = EP size."""

    attention_tp: int = option(1, "ranks that share the attention heads of a token")
    attention_dp: int = option(1, "groups of attention_tp ranks that hold different requests")
    replicas: int = option(1, "independent copies of the world; more than 1 is refused so far")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "attention_tp", "attention_dp", "replicas")

    @property
    def world_size(self) -> int:
        """Ranks of one replica; the experts are sharded over all of them."""
        return self.attention_tp * self.attention_dp


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The machines that a configuration is meant for."""

    nodes: int = option(1, "machines that take part")
    gpus_per_node: int | None = option(None, "GPUs of one machine; none: as the machine says")
    topology: str | None = option(
        None, "YAML file of the hops between ranks (dist/topology.py); none: as the machines say"
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "nodes", "gpus_per_node")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache of one DP group."""

    block_size: int = option(16, "tokens per KV block")
    num_blocks: int | None = option(
        None, "KV blocks per DP group; none: as many as the memory allows"
    )
    kv_cache_memory: int | None = option(
        None,
        "bytes of KV cache per rank (suffixes KiB MiB GiB); none: 1 GiB on a CPU, "
        "memory_utilization on a GPU",
        is_bytes=True,
    )
    memory_utilization: float = option(0.9, "share of a GPU's memory that the engine may use")
    prefix_cache: bool = option(True, "reuse the KV blocks of prompts that begin alike")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "block_size", "num_blocks", "kv_cache_memory")
        if not 0.0 < self.memory_utilization <= 1.0:
            raise ConfigError(f"memory_utilization is {self.memory_utilization}; it is in (0, 1]")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What one step may hold, per DP group."""

    max_model_len: int | None = option(
        None, "longest prompt plus output in tokens; None takes the model's"
    )
    max_num_seqs: int = option(256, "sequences that may run at once in a DP group")
    max_num_batched_tokens: int = option(2048, "tokens that a DP group computes in a step")
    max_prefill_chunk: int | None = option(
        None, "prompt tokens of one sequence in a step; None leaves it to the step's budget"
    )
    max_waiting: int = option(4096, "requests that may wait for admission")
    pipeline_depth: int | None = option(
        None, "steps that may be launched before the oldest has answered; None: 2 on a GPU, else 1"
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_model_len", "max_num_seqs", "max_prefill_chunk", "max_waiting")
        if self.pipeline_depth not in (None, 1, 2):
            raise ConfigError(f"pipeline_depth is {self.pipeline_depth}; it must be 1 or 2")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least "
                f"max_num_seqs = {self.max_num_seqs}, so that every running sequence can decode"
            )


@dataclass(frozen=True, slots=True)
class ExchangeConfig:
    """How tokens reach the experts of other ranks."""

    exchange: str = option(
        "auto",
        "dispatch/combine backend",
        choices=("auto", "local", "replicated", "collective", "nvlink"),
    )
    replicated_max_tokens: int = option(
        64, "auto picks the replicated backend (pure TP) up to this many tokens a step"
    )
    exchange_timeout: float = option(
        10.0, "nvlink: seconds after which a rank that sends nothing ends the engine"
    )
    in_network_reduction: bool = option(
        False, "nvlink: let the switches add up what all ranks bring; compiled, never run"
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_at_least(self, 0, "replicated_max_tokens")
        if self.in_network_reduction and self.exchange != "nvlink":
            raise ConfigError(
                f"in_network_reduction is for exchange 'nvlink', and that is {self.exchange!r}"
            )
        if not self.exchange_timeout > 0:
            raise ConfigError(f"exchange_timeout is {self.exchange_timeout}; it must be positive")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything that the ranks need to know besides the checkpoint itself."""

    model: str | None = option(
        None,
        "qwen3_moe checkpoint: a directory or Hugging Face repository id; none: the embedded demo",
    )
    load_format: str = option(
        "auto", "auto reads safetensors; dummy draws random weights", choices=("auto", "dummy")
    )
    dummy_expert_skew: float = option(
        0.0, "dummy weights: exponent of the Zipf law that the experts' popularity follows"
    )
    skip_tokenizer_init: bool = option(
        False, "do without a tokenizer: prompts are token ids, outputs have no text"
    )
    dtype: str = option(
        "auto",
        "data type of weights and activations; auto: the checkpoint's, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = option(
        "auto", "auto takes CUDA if there is a GPU", choices=("auto", "cpu", "cuda")
    )
    cuda_graphs: bool = option(
        True,
        "on a GPU, replay steps as CUDA graphs; false launches kernel by kernel (enforce_eager)",
    )
    seed: int = option(0, "seed of dummy weights and of requests that bring none")
    startup_timeout: float = option(600.0, "seconds the ranks have to load the model")
    step_timeout: float = option(
        300.0, "seconds after which a step that a rank does not finish ends the engine"
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("startup_timeout", "step_timeout"):
            if not getattr(self, name) > 0:  # so nan is refused as well
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0.0 <= self.dummy_expert_skew <= MAX_EXPERT_SKEW:
            raise ConfigError(
                f"dummy_expert_skew is {self.dummy_expert_skew}; it is in [0, {MAX_EXPERT_SKEW:g}]"
            )
        if self.dummy_expert_skew and self.load_format != "dummy":
            raise ConfigError("dummy_expert_skew is for load_format dummy")
        self._check_exchange()
        gpus = self.cluster.gpus_per_node
        needed = self.parallel.world_size * self.parallel.replicas
        if gpus is not None and needed > gpus * self.cluster.nodes:
            raise ConfigError(
                f"the layout needs {needed} ranks (attention_tp {self.parallel.attention_tp} x "
                f"attention_dp {self.parallel.attention_dp} x replicas {self.parallel.replicas}) "
                f"but the cluster has {gpus * self.cluster.nodes} GPUs "
                f"({self.cluster.nodes} nodes x {gpus})"
            )

    def _check_exchange(self) -> None:
        """Raise `ConfigError` for an exchange backend that the layout does not allow."""
        exchange, parallel = self.exchange.exchange, self.parallel
        layout = f"attention_tp {parallel.attention_tp} x attention_dp {parallel.attention_dp}"
        if exchange == "nvlink" and self.device == "cpu":
            raise ConfigError("exchange is 'nvlink', which needs device cuda, not cpu")
        if exchange == "local" and parallel.world_size > 1:
            raise ConfigError(f"exchange is 'local', which needs one rank, not {layout}")
        if self.exchange.in_network_reduction and parallel.attention_dp > 1:
            raise ConfigError(
                f"in_network_reduction is for sums over all ranks (attention_dp 1), not {layout}"
            )
        if exchange == "replicated" and parallel.attention_dp > 1:
            raise ConfigError(
                f"exchange is 'replicated', which needs all ranks to hold the same tokens "
                f"(attention_dp 1), not {layout}"
            )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP server."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 picks a free one")
    served_model_name: str | None = option(
        None, "name that clients ask for; none: the checkpoint directory's name"
    )
    max_body_bytes: int = option(
        4 << 20, "bytes of the largest request body (suffixes KiB MiB GiB)", is_bytes=True
    )
    log_level: str = option(
        "info", "least severe messages shown", choices=("debug", "info", "warning", "error")
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_at_least(self, 1, "max_body_bytes")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be in [0, 65535]")
