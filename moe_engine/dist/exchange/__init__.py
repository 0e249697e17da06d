"""Dispatch and combine: tokens to the ranks that hold their experts, and back."""

from moe_engine.dist.exchange.base import Exchange, ExpertShard, Received
from moe_engine.dist.exchange.select import ExchangeSelector, tokens_of_a_rank

__all__ = ["Exchange", "ExchangeSelector", "ExpertShard", "Received", "tokens_of_a_rank"]
