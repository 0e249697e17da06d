"""What the exchange's benchmark moves: the cases' names, tokens, and bytes.

Shape legend: N ranks, T tokens of each, E experts of all ranks, K experts per token.
"""

from __future__ import annotations

import torch

from moe_engine.dist.exchange.domain import ExchangeShape
from moe_engine.ops.reference.exchange import Tokens

# Rows in fp8 come from bfloat16, become it again, and go back as bfloat16.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.bfloat16,
}
ROUTINGS = ("uniform", "zipf", "incast")
EXCHANGES = 20  # of a graph
MOST_INPUT_BYTES = 2 << 30  # of the tokens that a graph's exchanges rotate through, of all ranks


def random_inputs(shape: ExchangeShape, routing: str, device: torch.device) -> list[Tokens]:
    """A rank's tokens for one exchange after the other, as many as it may bring."""
    input_bytes = shape.max_tokens * shape.row_bytes * shape.num_ranks
    num_inputs = max(1, min(EXCHANGES, MOST_INPUT_BYTES // input_bytes))
    return [
        Tokens(
            torch.randn(shape.max_tokens, shape.hidden, device=device).to(shape.dtype),
            choose(shape, routing, shape.max_tokens, device),
            torch.rand(shape.max_tokens, shape.top_k, device=device),
        )
        for _ in range(num_inputs)
    ]


def choose(
    shape: ExchangeShape, routing: str, num_tokens: int, device: torch.device
) -> torch.Tensor:
    """Expert ids [T, K]: all as likely, by Zipf's law, or all of rank 0."""
    scores_TE = torch.rand(num_tokens, shape.num_experts, device=device).log()
    if routing == "zipf":
        scores_TE *= torch.arange(1, shape.num_experts + 1, device=device)
    if routing == "incast":
        scores_TE = scores_TE[:, : shape.num_experts // shape.num_ranks]
    return scores_TE.topk(shape.top_k).indices.int()


def count_copies(shape: ExchangeShape, ids_TK: torch.Tensor) -> list[int]:
    """How many of a rank's tokens go to each rank, [N].

    Example, 2 ranks with 2 experts each, tokens for experts (0, 1) and (1, 2): 2 go to rank 0, 1 to
    rank 1.
    """
    num_local = shape.num_experts // shape.num_ranks
    goes_TN = torch.zeros(len(ids_TK), shape.num_ranks, dtype=torch.bool, device=ids_TK.device)
    goes_TN.scatter_(1, (ids_TK // num_local).long(), True)
    counts: list[int] = goes_TN.sum(dim=0).tolist()
    return counts


def count_bytes(shape: ExchangeShape, copies: list[list[int]]) -> dict[str, int]:
    """Of one exchange: those of the GPU's memory, and ``wire``, those that leave a rank.

    Args:
        copies: tokens of each rank that go to each rank, [N, N].
    """
    moved = {"dispatch": 0, "combine": 0, "wire_dispatch": 0, "wire_combine": 0}
    row, wire, num_tokens = shape.row_bytes, shape.wire_bytes, shape.max_tokens
    for home, counts in enumerate(copies):
        total = sum(counts)
        leaving = total - counts[home]
        # Rows that travel in 8 bits are read and written once more, where they arrive.
        restored = total * (wire + row) if shape.fp8 else 0
        moved["dispatch"] += num_tokens * row + total * wire + restored
        moved["combine"] += (num_tokens * shape.top_k + 2 * total + num_tokens) * row
        moved["wire_dispatch"] += leaving * wire
        moved["wire_combine"] += leaving * row
    return moved


def busiest_bytes(shape: ExchangeShape, copies: list[list[int]]) -> dict[str, int]:
    """Of one exchange, the most that leaves or enters a rank, over the links that it has.

    Example, 2 ranks, of which rank 0 sends 5 tokens to rank 1, and rank 1 sends 3 to rank 0: 5 rows
    in dispatch as in combine, which sends them back.
    """
    numbers = range(shape.num_ranks)
    leaving = [sum(copies[rank]) - copies[rank][rank] for rank in numbers]
    entering = [sum(row[rank] for row in copies) - copies[rank][rank] for rank in numbers]
    most = max(*leaving, *entering)
    return {"dispatch": most * shape.wire_bytes, "combine": most * shape.row_bytes}
