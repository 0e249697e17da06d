"""Cases of `ops.prefill_attention`, each run once and compared with float32 on the CPU.

Legend: T tokens, N query heads, G KV heads, D head dimension, L tokens a block, C context length,
P positions, F = D / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moe_engine.ops.prefill_attention import (
    QueryPreparation,
    prefill_attention,
    stage_tiles,
    tile_tokens,
)
from moe_engine.ops.prefill_plan import PrefillSpan
from moe_engine.ops.reference.rope import apply_rope
from tests.kernels.close import check_rows
from tests.kernels.paged import Case, expected, make_case

BF16 = torch.bfloat16
# Of an output before the kernel writes it.
UNWRITTEN = -77.0

# Of a block, as in csrc/prefill_tiles.cuh.
LISTED_ITEMS = 128

Lens = list[tuple[int, int]]


def random(k_CGD: torch.Tensor, positions_C: torch.Tensor) -> torch.Tensor:
    """Keys as they are."""
    return k_CGD


def growing(k_CGD: torch.Tensor, positions_C: torch.Tensor) -> torch.Tensor:
    """Keys whose scores grow along the context, for half of the queries, or fall, for the others:
    in a step of 128 tokens by a dozen powers of 2."""
    return k_CGD + positions_C[:, None, None] / 16


def constant(k_CGD: torch.Tensor, positions_C: torch.Tensor) -> torch.Tensor:
    """Keys whose scores are all alike, and far above or below 0."""
    return torch.full_like(k_CGD, 100)


@dataclass(frozen=True)
class Prefill:
    """A step.

    Attributes:
        lens: (query length, context length) of every sequence, those of one position first.
        others: how many of the first and of the last are no spans; what these have is NaN.
        raw: whether the kernel norms and rotates the queries.
    """

    lens: Lens
    num_heads: int = 8
    num_kv_heads: int = 1
    block_size: int = 16
    others: tuple[int, int] = (0, 0)
    keys: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = random
    raw: bool = False

    def __str__(self) -> str:
        return (
            f"{len(self.lens)} sequences {self.lens[:6]}, {self.num_heads} heads to "
            f"{self.num_kv_heads}, blocks of {self.block_size}, {self.keys.__name__} keys"
            f"{', raw queries' if self.raw else ''}"
        )

    def attended(self, case: Case) -> list[PrefillSpan]:
        """The spans of its case."""
        first, last = self.others
        return spans_of(case)[first : len(self.lens) - last]


# Chunks whose contexts begin and end beside the ends of tiles, of steps of 128 and of blocks.
CHUNKS = [(5, 6), (70, 203), (130, 389), (257, 300), (128, 261), (16, 1040)]
# Last tiles that are all but empty or full, with much, no and little context before the span.
FEW = [(40, 300), (129, 129), (260, 263)]
PREFILL_CASES = [
    Prefill([(1, 1)]),
    Prefill([(1, 1)], 1),
    Prefill([(1, 1), (1, 2), (1, 128), (1, 129), (1, 700)], 32, 4),
    Prefill([(n, n) for n in (2, 15, 16, 17, 64, 127, 128, 129, 256, 257)]),
    Prefill([(n, n) for n in (64, 128, 129, 257)], 2, 2),
    Prefill(CHUNKS, 32, 4),
    Prefill(CHUNKS, 3, 3, 64),
    Prefill([(1, 7), (1, 0), (1, 33), (9, 20), (150, 150), (33, 170), (8, 90)], 16, 2,
            others=(3, 1)),
    Prefill([(1, 40), (20, 30), (16, 16), (3, 140)], 4, 2, others=(2, 1)),
    # Of many spans.
    Prefill([(1, 5), *((2 + n % 20, 2 + n % 20 + n % 3 * 60) for n in range(70))],
            others=(1, 0)),
    *(Prefill(FEW, *heads) for heads in ((2, 2), (4, 2), (3, 1), (8, 2), (6, 1), (12, 1), (16, 1))),
    *(Prefill(FEW, block_size=block_size) for block_size in (8, 32, 64, 128, 256, 384)),
    *(Prefill([(1, 900), (300, 1000), (400, 400)], keys=keys) for keys in (growing, constant)),
    Prefill([(1, 1)], raw=True),
    Prefill(CHUNKS, 32, 4, raw=True),
    Prefill([(1, 7), (1, 0), (9, 20), (150, 150), (8, 90)], 16, 2, others=(2, 1), raw=True),
    *(Prefill(FEW, *heads, raw=True) for heads in ((2, 2), (4, 2), (8, 2), (6, 1), (16, 1))),
]  # fmt: skip


def spans_of(case: Case) -> list[PrefillSpan]:
    """Every sequence as a span, also those of one position."""
    contexts = case.batch.context_lens_S.tolist()
    return [
        PrefillSpan(*rows, context) for rows, context in zip(case.batch.rows, contexts, strict=True)
    ]


def make_preparation(case: Case) -> QueryPreparation:
    """With random angles of the positions that there are, and no more; on the CPU."""
    angles_PF = 6 * torch.rand(int(case.batch.context_lens_S.max()), 64)
    return QueryPreparation(
        (1 + 0.3 * torch.randn(128)).to(BF16), 1e-6, angles_PF.cos(), angles_PF.sin()
    )


def prepared(case: Case, preparation: QueryPreparation) -> Case:
    """The case with its queries normed and rotated in float32, and rounded."""
    weight_D, positions_T = preparation.norm_weight_D.float(), case.positions_T
    q_TND = torch.nn.functional.rms_norm(case.q_TND.float(), (128,), weight_D, preparation.eps)
    cos_TF, sin_TF = preparation.cos_PF[positions_T], preparation.sin_PF[positions_T]
    return replace(case, q_TND=apply_rope(q_TND, cos_TF, sin_TF).to(BF16))


def on_gpu(preparation: QueryPreparation) -> QueryPreparation:
    """A copy."""
    return QueryPreparation(
        preparation.norm_weight_D.cuda(),
        preparation.eps,
        preparation.cos_PF.cuda(),
        preparation.sin_PF.cuda(),
    )


def attend(
    case: Case,
    spans: list[PrefillSpan],
    first_table_row: int,
    preparation: QueryPreparation | None = None,
) -> torch.Tensor:
    """By the kernel, on the CPU again; rows outside the spans stay `UNWRITTEN`.

    Rows of queries lie apart, as in the projection, with NaN between them.
    """
    k_cache_BLGD, v_cache_BLGD = case.cache
    num_tokens, num_heads, head_dim = case.q_TND.shape
    num_kv_heads = k_cache_BLGD.shape[2]
    wide_TAD = torch.full((num_tokens, num_heads + 2 * num_kv_heads, head_dim), torch.nan).to(BF16)
    wide_TAD[:, :num_heads] = case.q_TND
    out_TND = torch.full(case.q_TND.shape, UNWRITTEN, dtype=BF16).cuda()
    prefill_attention(
        wide_TAD.cuda()[:, :num_heads],
        (k_cache_BLGD.cuda(), v_cache_BLGD.cuda()),
        case.batch.block_tables_SB.cuda(),
        stage_tiles(spans, first_table_row, tile_tokens(num_heads, num_kv_heads), out_TND.device),
        case.scale,
        out_TND,
        None if preparation is None else on_gpu(preparation),
    )
    return out_TND.cpu()


def make_prefill(prefill: Prefill) -> Case:
    """On the CPU; of sequences that are no spans, queries and cache hold NaN."""
    case = make_case(
        prefill.lens,
        device="cpu",
        dtype=BF16,
        num_heads=prefill.num_heads,
        num_kv_heads=prefill.num_kv_heads,
        head_dim=128,
        block_size=prefill.block_size,
    )
    attended = prefill.attended(case)
    for span, table in zip(spans_of(case), case.batch.block_tables_SB.long(), strict=True):
        positions = torch.arange(span.context_len)
        place = table[positions // prefill.block_size], positions % prefill.block_size
        keys, values = case.cache
        if span in attended:
            keys[place] = prefill.keys(keys[place].float(), positions).to(BF16)
        else:
            keys[place] = values[place] = torch.nan
            case.q_TND[span.first_row : span.first_row + span.query_len] = torch.nan
    return case


def run_prefill(prefill: Prefill) -> None:
    """The spans' rows, and none beside them."""
    case = make_prefill(prefill)
    spans = prefill.attended(case)
    preparation = make_preparation(case) if prefill.raw else None
    out_TND = attend(case, spans, prefill.others[0], preparation)
    expected_TND = expected(case if preparation is None else prepared(case, preparation))
    rows = slice(spans[0].first_row, spans[-1].first_row + spans[-1].query_len)
    check_rows(out_TND[rows].flatten(0, 1), expected_TND[rows].flatten(0, 1))
    assert (out_TND[: rows.start] == UNWRITTEN).all()
    assert (out_TND[rows.stop :] == UNWRITTEN).all()
