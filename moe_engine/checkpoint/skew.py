"""Uneven routing for dummy weights: some experts popular, most not, as in real traffic.

A router with random weights gives every expert the same popularity. Multiplying expert e's row by
s_e widens its logits to N(0, s_e^2) in units of an unskewed logit. An expert is chosen when its
logit passes the K-th largest of all, which with many experts hardly moves; taking it as a constant
t, expert e is chosen with probability p_e = Q(t / s_e), Q being the normal tail. So

    s_e = t / Qinv(p_e)        with t = Qinv(K / E), so that an even p gives s = 1

for the popularities p_e wanted: a Zipf law c / rank^a with the sum K, cut off at `MAX_POPULARITY`,
since a logit of mean 0 is positive only half the time. Which expert has which rank differs from
layer to layer. Letters: E experts, K of them per token.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from statistics import NormalDist

import torch

from moe_engine.checkpoint.dummy import tensor_key
from moe_engine.checkpoint.spec import WeightSpec
from moe_engine.errors import ConfigError

MAX_POPULARITY = 0.45


def zipf_popularity(num_experts: int, top_k: int, exponent: float) -> list[float]:
    """The share of tokens that choose each expert, most popular first; they sum to ``top_k``.

    Example: 4 experts, top 1, exponent 1: Zipf wants 0.48, 0.24, 0.16, 0.12; the first is cut off
    at 0.45 and the others share the rest: 0.45, 0.254, 0.169, 0.127.

    Raises:
        ConfigError: so many experts per token that not even equal shares stay below the cut.
    """
    if top_k / num_experts > MAX_POPULARITY:
        raise ConfigError(
            f"dummy_expert_skew needs num_experts_per_tok of at most {MAX_POPULARITY:.0%} of the "
            f"experts, not {top_k} of {num_experts}"
        )
    weights = [(rank + 1.0) ** -exponent for rank in range(num_experts)]
    num_cut = 0
    while True:
        factor = (top_k - num_cut * MAX_POPULARITY) / sum(weights[num_cut:])
        if factor * weights[num_cut] <= MAX_POPULARITY:
            break
        num_cut += 1
    return [MAX_POPULARITY] * num_cut + [factor * weight for weight in weights[num_cut:]]


@torch.no_grad()
def skew_routers(specs: Iterable[WeightSpec], top_k: int, exponent: float, seed: int) -> None:
    """Scale the rows of every router so that popularity follows a Zipf law.

    Raises:
        ConfigError: see `zipf_popularity`.
    """
    tail = NormalDist()
    for spec in specs:
        if not spec.name.endswith("mlp.gate.weight"):
            continue
        num_experts = spec.target.shape[0]
        threshold = -tail.inv_cdf(top_k / num_experts)
        scales = [
            threshold / -tail.inv_cdf(share)
            for share in zipf_popularity(num_experts, top_k, exponent)
        ]
        random.Random(tensor_key(seed, f"{spec.name}/popularity")).shuffle(scales)
        spec.target.mul_(torch.tensor(scales, device=spec.target.device)[:, None])
