"""Which rank does what: attention TP × DP, experts over the whole world (all pure arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass

from moe_engine.config import ModelConfig, ParallelConfig
from moe_engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RankLayout:
    """One rank's place: ranks of a DP group are neighbours, ``rank = dp_rank * tp + tp_rank``."""

    rank: int
    attention_tp: int
    attention_dp: int

    @property
    def world_size(self) -> int:
        """Ranks of the replica, which is also the expert-parallel size."""
        return self.attention_tp * self.attention_dp

    @property
    def tp_rank(self) -> int:
        """Place within the DP group."""
        return self.rank % self.attention_tp

    @property
    def dp_rank(self) -> int:
        """Which DP group the rank belongs to."""
        return self.rank // self.attention_tp

    def group_ranks(self, dp_rank: int) -> range:
        """Global ranks of a DP group."""
        return range(dp_rank * self.attention_tp, (dp_rank + 1) * self.attention_tp)


def split_evenly(total: int, parts: int) -> list[int]:
    """Sizes of ``parts`` contiguous shares of ``total`` that differ by at most one.

    Example: ``split_evenly(10, 4) == [3, 3, 2, 2]``.
    """
    base, extra = divmod(total, parts)
    return [base + (part < extra) for part in range(parts)]


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise `ConfigError` where the model cannot be cut as the layout asks."""
    tp, world = parallel.attention_tp, parallel.world_size
    problems = []
    if model.num_attention_heads % tp:
        problems.append(
            f"attention_tp {tp} does not divide the {model.num_attention_heads} attention heads"
        )
    if model.num_key_value_heads % tp and tp % model.num_key_value_heads:
        problems.append(
            f"attention_tp {tp} neither divides the {model.num_key_value_heads} KV heads "
            "nor is a multiple of them"
        )
    is_moe = [model.is_moe_layer(i) for i in range(model.num_hidden_layers)]
    if any(is_moe) and model.num_experts % world:
        problems.append(
            f"the world of {world} ranks (attention_tp {tp} x attention_dp "
            f"{parallel.attention_dp}) does not divide the {model.num_experts} experts"
        )
    if not all(is_moe) and model.intermediate_size % tp:
        problems.append(
            f"attention_tp {tp} does not divide the dense intermediate size "
            f"{model.intermediate_size}"
        )
    if parallel.replicas > 1:
        problems.append(
            f"replicas is {parallel.replicas}; one process group serves one replica: start "
            "each replica as an engine of its own and set replicas to 1"
        )
    if problems:
        raise ConfigError("impossible layout: " + "; ".join(problems))
