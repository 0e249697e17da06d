"""Rows to sample, and which tokens are right for them, worked out in float64.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import itertools

import torch

ALMOST_ONE = 1.0 - 2.0**-53
TOLERANCE = 1e-5
INF = float("inf")


def make_params(num_rows: int, **values: object) -> torch.Tensor:
    """float64 [5, B] from numbers or sequences; what is left out is off, the temperature 1."""
    defaults = {"temperature": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0, "uniform": 0.5}
    assert values.keys() <= defaults.keys()
    columns = [
        torch.as_tensor(value, dtype=torch.float64) for value in (defaults | values).values()
    ]
    return torch.stack([column.expand(num_rows) for column in columns])


def random_params(num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Rows of every kind, greedy ones among them."""
    generator = torch.Generator().manual_seed(seed)

    def choose(*options: float) -> torch.Tensor:
        picks = torch.randint(len(options), (num_rows,), generator=generator)
        return torch.tensor(options, dtype=torch.float64)[picks]

    return make_params(
        num_rows,
        temperature=choose(0.0, 0.3, 0.6, 0.6, 1.0, 1.0, 1.7),
        top_k=choose(0, 0, 1, 3, 20, vocab_size // 2, vocab_size - 1, vocab_size + 5),
        top_p=choose(1.0, 1.0, 0.95, 0.5, 0.1, 0.999, 1e-9, 5e-324),
        min_p=choose(0.0, 0.0, 0.0, 0.05, 0.5, 1.0, 1e-9),
        uniform=torch.rand(num_rows, generator=generator, dtype=torch.float64),
    )


def probabilities(logits_V: torch.Tensor, params_5: list[float]) -> torch.Tensor:
    """What each token's probability is, float64 [V]; the row must not be greedy."""
    temperature, top_k, top_p, min_p, _ = params_5
    scaled_V = logits_V.double().nan_to_num(nan=-INF, posinf=torch.finfo(torch.float32).max)
    scaled_V = scaled_V.masked_fill(logits_V.double() == -INF, -INF) / temperature
    if scaled_V.amax() == -INF:
        return torch.zeros_like(scaled_V).index_fill_(0, torch.tensor(0, device=scaled_V.device), 1)
    probs_V = torch.softmax(scaled_V, dim=0)
    scaled_V = scaled_V.masked_fill(probs_V < min_p * probs_V.amax(), -INF)
    if 0 < top_k < len(scaled_V):
        threshold = torch.topk(scaled_V, int(top_k)).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < threshold, -INF)
    probs_V = torch.softmax(scaled_V, dim=0)
    if top_p < 1.0:
        sorted_V, ids_V = torch.sort(probs_V, descending=True, stable=True)
        before_V = sorted_V.cumsum(0) - sorted_V
        before_V[0] = 0.0
        probs_V = probs_V.index_fill(0, ids_V[before_V >= top_p], 0.0)
    return probs_V / probs_V.sum()


def right_tokens(logits_V: torch.Tensor, params_5: list[float]) -> set[int]:
    """The tokens that a row may get: one, unless a number is within rounding of a boundary."""
    if params_5[0] == 0.0:
        cleaned_V = logits_V.masked_fill(logits_V.isnan(), -INF)
        return {int(torch.nonzero(cleaned_V == cleaned_V.amax())[0])}
    temperature, top_k, top_p, min_p, uniform = params_5
    tokens = set()
    shifts = (1.0 - TOLERANCE, 1.0, 1.0 + TOLERANCE)
    top_ps = {top_p} if top_p == 1.0 else {min(top_p * shift, 1.0 - 2.0**-53) for shift in shifts}
    min_ps = {min(min_p * shift, 1.0) for shift in shifts}
    for some_p, other_p in itertools.product(top_ps, min_ps):
        sums_V = probabilities(logits_V, [temperature, top_k, some_p, other_p, 0.0]).cumsum(0)
        for shift in (-TOLERANCE, 0.0, TOLERANCE):
            # The last possible token has the largest sum, whatever the sum is rounded to.
            target = min(max((uniform + shift) * float(sums_V[-1]), 0.0), float(sums_V[-1]) - 1e-15)
            tokens.add(int(torch.searchsorted(sums_V, target, right=True)))
    return tokens


def middles(probs_V: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Tokens that can be drawn, and the uniform number in the middle of each one's interval."""
    sums_V = probs_V.cumsum(0)
    tokens = torch.nonzero(probs_V > 10 * TOLERANCE).flatten()
    return tokens.tolist(), (sums_V - probs_V / 2)[tokens]
