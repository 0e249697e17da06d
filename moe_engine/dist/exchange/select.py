"""Which exchange backend a step uses: a function of the step plan, so the same on every rank."""

from __future__ import annotations

from moe_engine.config import ExchangeConfig
from moe_engine.dist.exchange.base import Exchange, ExpertShard
from moe_engine.dist.exchange.collective import CollectiveExchange
from moe_engine.dist.exchange.local import LocalExchange
from moe_engine.dist.exchange.replicated import ReplicatedExchange
from moe_engine.dist.groups import ParallelGroups


class ExchangeSelector:
    """Holds the backends that a layout allows and picks one per step.

    `EngineConfig` has made sure that the configured backend is one of them.
    """

    def __init__(self, config: ExchangeConfig, groups: ParallelGroups, num_experts: int) -> None:
        self._config = config
        world = groups.layout.world_size
        shard = ExpertShard(num_experts, world, groups.layout.rank)
        self._backends: dict[str, Exchange] = {"collective": CollectiveExchange(shard, groups.ep)}
        if world == 1:
            self._backends["local"] = LocalExchange()
        if groups.layout.attention_dp == 1:
            self._backends["replicated"] = ReplicatedExchange(shard, groups.ep)
        assert config.exchange in ("auto", *self._backends), config.exchange

    def select(self, num_tokens: int) -> Exchange:
        """The backend for a step in which a DP group computes at most ``num_tokens`` tokens."""
        if self._config.exchange != "auto":
            return self._backends[self._config.exchange]
        if "local" in self._backends:
            return self._backends["local"]
        few = num_tokens <= self._config.replicated_max_tokens
        return self._backends["replicated" if few and "replicated" in self._backends else "collective"]
