"""Inputs of the attention benchmark over a paged cache, and what makes a result a wrong one.

The heads are Qwen3-30B-A3B's, whose cache takes 2 GiB, unless `set_heads` says otherwise.

Legend: S sequences, T tokens, N query heads, G KV heads, D head dimension, B blocks, L tokens a
block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moe_engine.ops.attention import HeadNorms
from moe_engine.ops.paged_batch import PagedBatch
from moe_engine.ops.prefill_plan import PrefillSpan
from moe_engine.ops.reference.rope import norm_rope_write as reference_norm_rope_write
from moe_engine.ops.rope import RopeTable

DEVICE = "cuda"
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 4, 128, 16
NUM_BLOCKS = 1 << 16
SCALE = HEAD_DIM**-0.5
NUM_POSITIONS = 40960
EPS = 1e-6
# Outputs are averages of values around 1, in bfloat16.
TOLERANCE = 3e-2
# Queries and keys are a rounding of bfloat16 apart, at values up to 16.
PREPARED_TOLERANCE = 2**-4

Cache = tuple[torch.Tensor, torch.Tensor]


def set_heads(num_heads: int, num_kv_heads: int) -> None:
    """Make all inputs from here on of another model's heads.

    Raises:
        ValueError: query heads cannot be shared out evenly among the KV heads.
    """
    global NUM_HEADS, NUM_KV_HEADS
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    NUM_HEADS, NUM_KV_HEADS = num_heads, num_kv_heads


def token_bytes(item_size: int) -> int:
    """Bytes of one token's keys and values, with elements of ``item_size`` bytes."""
    return 2 * NUM_KV_HEADS * HEAD_DIM * item_size


def projection_width() -> int:
    """Columns of the fused projection of queries, keys and values."""
    return (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM


@dataclass(frozen=True)
class Inputs:
    """One step: queries [T, N, D] and where they stand."""

    q_TND: torch.Tensor
    batch: PagedBatch

    @property
    def positions_T(self) -> torch.Tensor:
        """Where the step's own tokens stand in their contexts."""
        contexts = self.batch.context_lens_S.tolist()
        return torch.cat(
            [
                torch.arange(context - query_len, context, device=DEVICE)
                for (_, query_len), context in zip(self.batch.rows, contexts, strict=True)
            ]
        )

    def own_kv(self, cache: Cache) -> torch.Tensor:
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
    """One for each step, at the ends of its contexts; norms and angles are shared."""
    return _projections([one.positions_T for one in inputs])


def make_token_projections(num_tokens: int, num_steps: int) -> list[Projection]:
    """As many steps of tokens that stand anywhere; norms and angles are shared."""
    shape = (num_steps, num_tokens)
    return _projections(list(torch.randint(0, NUM_POSITIONS, shape, device=DEVICE)))


def _projections(positions: list[torch.Tensor]) -> list[Projection]:
    q_weight_D, k_weight_D = torch.rand(2, HEAD_DIM, device=DEVICE).bfloat16()
    angles_PF = torch.rand(NUM_POSITIONS, HEAD_DIM // 2, device=DEVICE)
    norms = HeadNorms(q_weight_D, k_weight_D, EPS)
    rope = RopeTable(angles_PF.cos(), angles_PF.sin())
    width = projection_width()
    return [
        Projection(
            torch.randn(len(positions_T), width, device=DEVICE, dtype=torch.bfloat16),
            norms,
            rope,
            positions_T,
        )
        for positions_T in positions
    ]


def make_cache(dtype: torch.dtype = torch.bfloat16) -> Cache:
    """Random keys and values, each [B, L, G, D]."""
    shape = (NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    keys, values = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in "kv")
    return keys.to(dtype), values.to(dtype)


def make_inputs(lens: list[tuple[int, int]]) -> Inputs:
    """A step of (query length, context length), decodes first; blocks anywhere in the cache."""
    width = max(-(-context // BLOCK_SIZE) for _, context in lens)
    order = torch.randperm(NUM_BLOCKS, device=DEVICE)
    needed = len(lens) * width
    tables_SB = order.repeat(-(-needed // NUM_BLOCKS))[:needed].view(len(lens), width)
    slots, spans, starts = [], [], [0]
    for table, (query_len, context) in zip(tables_SB, lens, strict=True):
        positions = torch.arange(context - query_len, context, device=DEVICE)
        slots.append(table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
        if query_len > 1:
            spans.append(PrefillSpan(starts[-1], query_len, context))
        starts.append(starts[-1] + query_len)
    batch = PagedBatch(
        slots_T=torch.cat(slots),
        block_tables_SB=tables_SB.to(torch.int32),
        context_lens_S=torch.tensor([c for _, c in lens], dtype=torch.int32, device=DEVICE),
        query_starts_S=torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        num_decodes=len(lens) - len(spans),
        prefills=tuple(spans),
    )
    q_TND = torch.randn(starts[-1], NUM_HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    return Inputs(q_TND, batch)


def decode_contexts(batch_size: int, context: int | str) -> list[int]:
    """Contexts of a batch; "mixed" are lengths from 64 to 4032 that go up and down."""
    if isinstance(context, int):
        return [context] * batch_size
    return [64 + (i * 2477) % 3969 for i in range(batch_size)]


def worst_difference(inputs: Inputs, cache: Cache, out_TND: torch.Tensor) -> float:
    """Largest difference from float32 attention, over a few rows of each of a few sequences."""
    batch, worst = inputs.batch, torch.zeros((), device=DEVICE)
    rows = batch.rows
    step = max(1, len(rows) // 6)
    contexts = batch.context_lens_S.tolist()
    for index in [*range(0, len(rows), step), len(rows) - 1]:
        first, query_len = rows[index]
        context = contexts[index]
        positions = torch.arange(context, device=DEVICE)
        blocks = batch.block_tables_SB[index].long()[positions // BLOCK_SIZE]
        k_CGD, v_CGD = (tensor[blocks, positions % BLOCK_SIZE].float() for tensor in cache)
        chosen = torch.linspace(0, query_len - 1, min(query_len, 33), device=DEVICE).long()
        q = inputs.q_TND[first + chosen].float().unflatten(1, (NUM_KV_HEADS, -1))
        scores = torch.einsum("tgrd,cgd->grtc", q, k_CGD) * SCALE
        seen = positions[None, :] <= (context - query_len + chosen)[:, None]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        expected = torch.einsum("grtc,cgd->tgrd", weights, v_CGD).flatten(1, 2)
        difference = (out_TND[first + chosen].float() - expected).abs().max()
        worst = torch.maximum(worst, difference)  # keeps a NaN, unlike max()
    return worst.item()


def check(name: str, error: float, tolerance: float = TOLERANCE) -> None:
    """`SystemExit` if the error is larger than allowed, or no number."""
    if not error <= tolerance:
        raise SystemExit(f"{name} is off by {error:.3g}, more than {tolerance}; it was not timed")


def prepare(new: Projection, slots_T: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, float]:
    """The reference's queries, and how far what is cached at the slots is from its keys and values.

    Its own are cached there afterwards.
    """
    written = [tensor.flatten(0, 1)[slots_T].float() for tensor in cache]
    q_TND = reference_norm_rope_write(
        new.qkv_TX, new.norms.q_weight_D, new.norms.k_weight_D, new.norms.eps,
        (new.rope.cos_PF, new.rope.sin_PF), new.positions_T, *cache, slots_T,
    )  # fmt: skip
    expected = [tensor.flatten(0, 1)[slots_T].float() for tensor in cache]
    differences = [(w - e).abs().max() for w, e in zip(written, expected, strict=True)]
    return q_TND, torch.stack(differences).max().item()


def forget(slots_T: torch.Tensor, cache: Cache) -> None:
    """Clear the slots, so that who does not write them is found out."""
    for tensor in cache:
        tensor.flatten(0, 1)[slots_T] = 0


def check_preparation(
    name: str,
    new: Projection,
    slots_T: torch.Tensor,
    cache: Cache,
    run: Callable[[], torch.Tensor],
) -> float:
    """The error of ``run``, which fills the slots and returns the queries; exits if it is wrong."""
    forget(slots_T, cache)
    q_TND = run()
    expected_TND, error = prepare(new, slots_T, cache)
    check(f"{name}: what is cached", error, PREPARED_TOLERANCE)
    error_of_q = (q_TND.float() - expected_TND.float()).abs().max().item()
    check(name, error_of_q, PREPARED_TOLERANCE)
    return max(error, error_of_q)


def check_attend(
    name: str, inputs: Inputs, new: Projection, cache: Cache, run: Callable[[], torch.Tensor]
) -> float:
    """The error of ``run``, which attends from the projection on; exits if it is wrong."""
    slots_T = inputs.batch.slots_T
    forget(slots_T, cache)
    out_TND = run()
    q_TND, error = prepare(new, slots_T, cache)
    check(f"{name}: what is cached", error, PREPARED_TOLERANCE)
    error = worst_difference(replace(inputs, q_TND=q_TND), cache, out_TND)
    check(name, error)
    return error
