"""Dispatch and combine: tokens to the ranks that hold their experts, and back."""

from moe_engine.dist.exchange.base import Exchange, ExpertShard, Received
from moe_engine.dist.exchange.select import ExchangeSelector

__all__ = ["Exchange", "ExchangeSelector", "ExpertShard", "Received"]
