"""Which exchange backend a step uses: a function of the step plan, so the same on every rank."""

from __future__ import annotations

from moe_engine.config import ExchangeConfig
from moe_engine.dist.exchange.base import Exchange, ExpertShard
from moe_engine.dist.exchange.collective import CollectiveExchange
from moe_engine.dist.exchange.domain import NvlinkDomain
from moe_engine.dist.exchange.local import LocalExchange
from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.dist.exchange.replicated import ReplicatedExchange
from moe_engine.dist.groups import ParallelGroups


class ExchangeSelector:
    """Holds the backends that a layout allows and picks one per step.

    `EngineConfig` has made sure that the configured backend is one of them.

    Args:
        domain: the ranks whose memory this one shares; None: the backend is not ``nvlink``.
    """

    def __init__(
        self,
        config: ExchangeConfig,
        groups: ParallelGroups,
        num_experts: int,
        domain: NvlinkDomain | None = None,
    ) -> None:
        self._config = config
        self._attention_tp = groups.layout.attention_tp
        self._domain = domain
        world = groups.layout.world_size
        shard = ExpertShard(num_experts, world, groups.layout.rank)
        self._backends: dict[str, Exchange] = {"collective": CollectiveExchange(shard, groups.ep)}
        if world == 1:
            self._backends["local"] = LocalExchange()
        if groups.layout.attention_dp == 1:  # then the TP group has all ranks
            self._backends["replicated"] = ReplicatedExchange(shard, groups.tp)
        assert (config.exchange == "nvlink") == (domain is not None), (config.exchange, domain)
        assert config.exchange in ("auto", "nvlink", *self._backends), config.exchange

    def select(self, num_tokens: int) -> Exchange:
        """The backend for a step in which a DP group computes at most ``num_tokens`` tokens."""
        if self._domain is not None:
            replicated = self._backends.get("replicated")
            if replicated and num_tokens <= self._domain.shape.replicated_tokens:
                return replicated
            step_tokens = tokens_of_a_rank(max(1, num_tokens), self._attention_tp)
            return NvlinkExchange(self._domain, step_tokens)
        if self._config.exchange != "auto":
            return self._backends[self._config.exchange]
        if "local" in self._backends:
            return self._backends["local"]
        few = num_tokens <= self._config.replicated_max_tokens
        return self._backends[
            "replicated" if few and "replicated" in self._backends else "collective"
        ]

    @property
    def num_bytes(self) -> int:
        """Of the device memory that the backends hold all the time."""
        return 0 if self._domain is None else self._domain.num_bytes

    def check(self) -> None:
        """After the device has ended a step: raises what went wrong in its exchanges.

        Raises:
            ExchangeTimeout: a rank did not send what this one waited for.
        """
        if self._domain is not None:
            self._domain.check()


def tokens_of_a_rank(num_tokens: int, attention_tp: int) -> int:
    """Tokens that a rank brings, at most, where its TP group shares so many out."""
    return -(-num_tokens // attention_tp)
