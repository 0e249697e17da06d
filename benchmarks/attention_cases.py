"""Inputs of the attention benchmark: Qwen3-30B-A3B's heads over a paged cache of 2 GiB.

Legend: S sequences, T tokens, N query heads, G KV heads, D head dimension, B blocks, L tokens a
block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_engine.ops.attention import HeadNorms, PagedBatch, PrefillSpan
from moe_engine.ops.rope import RopeTable

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 4, 128, 16
NUM_BLOCKS = 1 << 16
SCALE = HEAD_DIM**-0.5
TOKEN_BYTES = 2 * NUM_KV_HEADS * HEAD_DIM  # of elements of one byte
NUM_POSITIONS = 40960
EPS = 1e-6
# Outputs are averages of values around 1, in bfloat16.
TOLERANCE = 3e-2


@dataclass(frozen=True)
class Inputs:
    """One step: queries [T, N, D] and where they stand."""

    q_TND: torch.Tensor
    batch: PagedBatch

    def own_kv(self, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The cached keys and values of the step's own tokens, [2, T, G, D]."""
        return torch.stack([tensor.flatten(0, 1)[self.batch.slots_T] for tensor in cache])


@dataclass(frozen=True)
class Projection:
    """What a step's queries, keys and values are made of."""

    qkv_TX: torch.Tensor
    norms: HeadNorms
    rope: RopeTable
    positions_T: torch.Tensor


def make_projections(inputs: list[Inputs]) -> list[Projection]:
    """One for each step of decodes, at the ends of the contexts; norms and angles are shared."""
    q_weight_D, k_weight_D = torch.rand(2, HEAD_DIM, device="cuda").bfloat16()
    angles_PF = torch.rand(NUM_POSITIONS, HEAD_DIM // 2, device="cuda")
    norms = HeadNorms(q_weight_D, k_weight_D, EPS)
    rope = RopeTable(angles_PF.cos(), angles_PF.sin())
    width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    return [
        Projection(
            torch.randn(one.batch.num_tokens, width, device="cuda", dtype=torch.bfloat16),
            norms,
            rope,
            one.batch.context_lens_S.long() - 1,
        )
        for one in inputs
    ]


def make_cache(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values, each [B, L, G, D]."""
    shape = (NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    return keys.to(dtype), values.to(dtype)


def make_inputs(lens: list[tuple[int, int]]) -> Inputs:
    """A step of (query length, context length), decodes first; blocks anywhere in the cache."""
    width = max(-(-context // BLOCK_SIZE) for _, context in lens)
    order = torch.randperm(NUM_BLOCKS, device="cuda")
    needed = len(lens) * width
    tables_SB = order.repeat(-(-needed // NUM_BLOCKS))[:needed].view(len(lens), width)
    slots, spans, starts = [], [], [0]
    for table, (query_len, context) in zip(tables_SB, lens, strict=True):
        positions = torch.arange(context - query_len, context, device="cuda")
        slots.append(table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
        if query_len > 1:
            spans.append(PrefillSpan(starts[-1], query_len, context))
        starts.append(starts[-1] + query_len)
    batch = PagedBatch(
        slots_T=torch.cat(slots),
        block_tables_SB=tables_SB.to(torch.int32),
        context_lens_S=torch.tensor([c for _, c in lens], dtype=torch.int32, device="cuda"),
        query_starts_S=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        num_decodes=len(lens) - len(spans),
        prefills=tuple(spans),
    )
    q_TND = torch.randn(starts[-1], NUM_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return Inputs(q_TND, batch)


def decode_contexts(batch_size: int, context: int | str) -> list[int]:
    """Contexts of a batch; "mixed" are lengths from 64 to 4032 that go up and down."""
    if isinstance(context, int):
        return [context] * batch_size
    return [64 + (i * 2477) % 3969 for i in range(batch_size)]


def worst_difference(
    inputs: Inputs, cache: tuple[torch.Tensor, torch.Tensor], out_TND: torch.Tensor
) -> float:
    """Largest difference from float32 attention, over a few rows of each of a few sequences."""
    batch, worst = inputs.batch, 0.0
    rows = batch.rows
    step = max(1, len(rows) // 6)
    contexts = batch.context_lens_S.tolist()
    for index in [*range(0, len(rows), step), len(rows) - 1]:
        first, query_len = rows[index]
        context = contexts[index]
        positions = torch.arange(context, device="cuda")
        blocks = batch.block_tables_SB[index].long()[positions // BLOCK_SIZE]
        k_CGD, v_CGD = (tensor[blocks, positions % BLOCK_SIZE].float() for tensor in cache)
        chosen = torch.linspace(0, query_len - 1, min(query_len, 33), device="cuda").long()
        q = inputs.q_TND[first + chosen].float().unflatten(1, (NUM_KV_HEADS, -1))
        scores = torch.einsum("tgrd,cgd->grtc", q, k_CGD) * SCALE
        seen = positions[None, :] <= (context - query_len + chosen)[:, None]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        expected = torch.einsum("grtc,cgd->tgrd", weights, v_CGD).flatten(1, 2)
        difference = (out_TND[first + chosen].float() - expected).abs().max()
        # Not max(): a NaN would lose every comparison.
        worst = difference.item() if not difference.item() <= worst else worst
    return worst
