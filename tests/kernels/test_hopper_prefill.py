"""Prefill attention on Hopper beyond its edge shapes, which `test_hopper` runs: launches, bits.

Legend: T tokens, N query heads, G KV heads, D head dimension, L tokens a block.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from moe_engine.ops import attention, prefill_attention
from moe_engine.ops.attention import paged_attention
from moe_engine.ops.linear import linear
from moe_engine.ops.prefill_attention import (
    QueryPreparation,
    stage_tiles,
    tile_tokens,
)
from moe_engine.ops.prefill_plan import PrefillSpan
from moe_engine.ops.rope import RopeTable, norm_rope_write
from tests.kernels.close import check_rows
from tests.kernels.paged import expected, in_the_last_blocks, make_case
from tests.kernels.prefill_cases import (
    CHUNKS,
    FEW,
    LISTED_ITEMS,
    UNWRITTEN,
    Prefill,
    attend,
    make_prefill,
    make_preparation,
    on_gpu,
    run_prefill,
    spans_of,
)

pytestmark = pytest.mark.usefixtures("needs_hopper")

BF16 = torch.bfloat16
QWEN3 = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "block_size": 16}


@pytest.mark.parametrize(
    "prefill",
    [
        # Several tiles for each multiprocessor; many spans.
        Prefill([(1, 50), (2000, 2000), (700, 3000), (1024, 1024)], 32, 4, others=(1, 0)),
        Prefill([(272 + n % 3, 272 + n % 5 + n % 3) for n in range(66)]),
    ],
    ids=str,
)
def test_many_tiles_match_float32(prefill: Prefill) -> None:
    run_prefill(prefill)


def test_more_items_than_a_block_looks_up_beforehand_match_float32() -> None:
    """Of 16 KV heads each span is 16 items, and only a few more tokens."""
    num_blocks = torch.cuda.get_device_properties(0).multi_processor_count
    num_spans = LISTED_ITEMS * num_blocks // 16 + 99
    run_prefill(Prefill([(2 + n % 3, 2 + n % 3 + n % 7) for n in range(num_spans)], 16, 16))


@pytest.mark.parametrize("heads", [(32, 4), (2, 1), (5, 5)])
def test_a_span_gets_the_same_bits_whoever_is_beside_it(heads: tuple[int, int]) -> None:
    prefill = Prefill([(1, 300), *CHUNKS, (1500, 1500), *[(40, 90)] * 70], *heads)
    case = make_prefill(prefill)
    spans = spans_of(case)
    together_TND = attend(case, spans, 0)
    for number in (0, 1, 4, 7, 8, len(spans) - 1):
        span = spans[number]
        rows = slice(span.first_row, span.first_row + span.query_len)
        alone = replace(case, q_TND=case.q_TND[rows])
        out_TND = attend(alone, [replace(span, first_row=0)], number)
        assert torch.equal(out_TND, together_TND[rows])


@pytest.mark.parametrize("heads", [(32, 4), (2, 2)])
def test_a_row_gets_the_same_bits_in_whatever_chunk_it_is_computed(heads: tuple[int, int]) -> None:
    case = make_prefill(Prefill([(700, 700)], *heads))
    whole_TND = attend(case, spans_of(case), 0)
    for start, end in pairwise([0, 100, 101, 357, 384, 700]):
        chunk_TND = attend(case, [PrefillSpan(start, end - start, end)], 0)
        assert torch.equal(chunk_TND[start:end], whole_TND[start:end])


# Several items for each multiprocessor, whose blocks use the same shared memory again and again.
MANY = [(1, 50), (3000, 3000), (700, 3700), (2000, 2000)]
MANY_SPANS = [(1, 5), *((2 + n % 20, 2 + n % 20 + n % 3 * 60) for n in range(70))]


@pytest.mark.parametrize("heads", [(16, 16), (16, 8), (16, 4), (24, 4), (32, 4), (32, 2)])
@pytest.mark.parametrize(
    ("lens", "others"),
    [([(1, 40), *CHUNKS, (7, 9)], (1, 1)), (FEW, (0, 0)), (MANY, (1, 0)), (MANY_SPANS, (1, 0))],
    ids=["chunks", "last tiles", "many items", "many spans"],
)
def test_raw_queries_get_the_bits_of_prepared_ones(
    lens: list[tuple[int, int]], others: tuple[int, int], heads: tuple[int, int]
) -> None:
    """1, 2, 4, 6, 8 and 16 query heads of a KV head; rows outside the spans hold NaN."""
    prefill = Prefill(lens, *heads, others=others)
    case = make_prefill(prefill)
    spans, preparation = prefill.attended(case), make_preparation(case)
    raw_TND = attend(case, spans, others[0], preparation)
    num_tokens, there = len(case.q_TND), on_gpu(preparation)
    nothing_TX = case.q_TND.new_zeros(num_tokens, 2 * heads[1] * 128)
    q_TND = norm_rope_write(
        torch.cat([case.q_TND.flatten(1), nothing_TX], 1).cuda(),
        there.norm_weight_D,
        there.norm_weight_D,
        there.eps,
        RopeTable(there.cos_PF, there.sin_PF),
        case.positions_T.cuda(),
        (case.cache[0].cuda(), case.cache[1].cuda()),
        torch.full((num_tokens,), -1, device="cuda"),
    )
    assert torch.equal(raw_TND, attend(replace(case, q_TND=q_TND.cpu()), spans, others[0]))


def test_the_operator_leaves_all_prompts_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that cuDNN could attend to, and gives decodes beside them to another kernel."""
    launches, launch = [], prefill_attention.prefill_attention
    monkeypatch.setattr(
        prefill_attention,
        "prefill_attention",
        lambda *args: launches.append(args) or launch(*args),
    )
    monkeypatch.setattr(attention.cudnn_prefill, "attend", lambda *_: pytest.fail("by cuDNN"))
    for lens, num_launches in (
        ([(512, 512)] * 8, 1),
        ([(1030, 1030)], 1),
        ([(1, 40), (1, 0), (1500, 1500), (70, 70), (100, 900)], 1),
        ([(1, 40), *[(2, 20)] * 65], 1),
        ([(1, 40), (1, 600)], 0),
    ):
        case = make_case(lens, device="cuda", dtype=BF16, **QWEN3)
        expected_TND = expected(case)
        for own_kv_2TGD in (None, case.own_kv_2TGD):
            launches.clear()
            out_TND = paged_attention(case.q_TND, case.cache, case.batch, case.scale, own_kv_2TGD)
            assert len(launches) == num_launches
            check_rows(out_TND.flatten(0, 1), expected_TND.flatten(0, 1))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("lens", [[(1, 9), (300, 300), (200, 450)], [(1, 9), (9, 300), (6, 450)]])
def test_it_waits_for_its_queries_keys_and_values(lens: list[tuple[int, int]], raw: bool) -> None:
    """It begins before the kernels that make them have ended; they change from call to call.

    So does the projection of up to 16 rows begin early, before the kernel that prepares them.
    """
    case = make_case(lens, device="cuda", dtype=BF16, **QWEN3)
    norm_weights = torch.rand(2, 128, device="cuda").to(BF16)
    angles_PF = torch.rand(450, 64, device="cuda")
    rope, positions_T = RopeTable(angles_PF.cos(), angles_PF.sin()), case.positions_T
    preparation = QueryPreparation(norm_weights[0], 1e-6, rope.cos_PF, rope.sin_PF)
    x_NTX = torch.randn(20, case.batch.num_tokens, 512, device="cuda").to(BF16)
    weight_OX = (torch.randn(40 * 128, 512, device="cuda") / 23).to(BF16)
    tiles = case.batch.prefill_tiles(tile_tokens(32, 4))

    def run(wait: bool) -> torch.Tensor:
        cache = case.cache[0].clone(), case.cache[1].clone()
        out_NTND = case.q_TND.new_zeros(len(x_NTX), *case.q_TND.shape)
        for x_TX, out_TND in zip(x_NTX, out_NTND, strict=True):
            qkv_TX = linear(x_TX, weight_OX)
            if wait:
                torch.cuda.synchronize()
            q_TND = norm_rope_write(
                qkv_TX[:, 32 * 128 :] if raw else qkv_TX, *norm_weights, 1e-6, rope, positions_T,
                cache, case.batch.slots_T,
            )  # fmt: skip
            if wait:
                torch.cuda.synchronize()
            prefill_attention.prefill_attention(
                qkv_TX[:, : 32 * 128].unflatten(1, (32, 128)) if raw else q_TND,
                cache,
                case.batch.block_tables_SB,
                tiles,
                case.scale,
                out_TND,
                preparation if raw else None,
            )
            del qkv_TX, q_TND  # the next call's may lie there
        return out_NTND

    assert torch.equal(run(wait=False), run(wait=True))


def test_offsets_pass_two_to_the_31() -> None:
    case = make_case([(70, 300), (40, 40)], device="cuda", dtype=BF16, **QWEN3)
    assert prefill_attention.takes(BF16, 32, case.cache[0])
    moved = in_the_last_blocks(case)
    near_TND, far_TND = (
        paged_attention(one.q_TND, one.cache, one.batch, one.scale) for one in (case, moved)
    )
    assert torch.equal(near_TND, far_TND)


def test_it_is_not_taken_where_it_does_not_fit() -> None:
    def takes(
        num_heads: int = 8,
        block_size: int = 16,
        head_dim: int = 128,
        dtype: torch.dtype = BF16,
        cache_dtype: torch.dtype = BF16,
        device: str = "cuda",
    ) -> bool:
        shape = (4, block_size, 2, head_dim)
        k_cache_BLGD = torch.empty(shape, dtype=cache_dtype, device=device)
        return prefill_attention.takes(dtype, num_heads, k_cache_BLGD)

    for num_heads in (2, 6, 8, 64):
        assert takes(num_heads)
    for block_size in (8, 16, 32, 64, 128, 256, 384):
        assert takes(block_size=block_size)
    for block_size in (1, 4, 12, 24, 192):
        assert not takes(block_size=block_size)
    assert not takes(num_heads=9)
    assert not takes(head_dim=64)
    assert not takes(dtype=torch.float16, cache_dtype=torch.float16)
    assert not takes(cache_dtype=torch.float8_e4m3fn)
    assert not takes(device="cpu")


def test_what_it_does_not_fit_is_refused() -> None:
    cache_BLGD = torch.zeros(4, 12, 2, 128, dtype=BF16, device="cuda")
    q_TND = torch.zeros(16, 8, 128, dtype=BF16, device="cuda")
    tables_SB = torch.zeros(1, 4, dtype=torch.int32, device="cuda")
    tiles = stage_tiles([PrefillSpan(0, 16, 16)], 0, 32, q_TND.device)
    with pytest.raises(ValueError, match="8 query heads, 2 KV heads and blocks of 12"):
        prefill_attention.prefill_attention(
            q_TND, (cache_BLGD, cache_BLGD), tables_SB, tiles, 1.0, torch.empty_like(q_TND)
        )


def test_a_launch_may_have_room_for_more_tiles_than_there_are() -> None:
    """As in a CUDA graph, which is replayed for other numbers of tiles; behind them is nonsense."""
    case = make_prefill(Prefill(CHUNKS, 32, 4))
    expected_TND = attend(case, spans_of(case), 0)
    staged = stage_tiles(spans_of(case), 0, tile_tokens(32, 4), torch.device("cuda"))
    for extra in (1, 200, 2000):
        room = torch.full((len(staged.tiles_M) + extra,), -1, dtype=torch.int32, device="cuda")
        room[:-extra] = staged.tiles_M
        out_TND = torch.zeros_like(case.q_TND, device="cuda")
        prefill_attention.prefill_attention(
            case.q_TND.cuda(),
            (case.cache[0].cuda(), case.cache[1].cuda()),
            case.batch.block_tables_SB.cuda(),
            replace(staged, tiles_M=room),
            case.scale,
            out_TND,
        )
        assert torch.equal(out_TND.cpu(), expected_TND)


def test_there_may_be_no_tile() -> None:
    case = make_prefill(Prefill(CHUNKS, 32, 4))
    assert (attend(case, [], 0) == UNWRITTEN).all()
    staged = stage_tiles([], 0, 16, torch.device("cuda"))
    room = torch.full((50,), -1, dtype=torch.int32, device="cuda")
    out_TND = torch.full_like(case.q_TND, UNWRITTEN, device="cuda")
    prefill_attention.prefill_attention(
        case.q_TND.cuda(),
        (case.cache[0].cuda(), case.cache[1].cuda()),
        case.batch.block_tables_SB.cuda(),
        replace(staged, tiles_M=room, spans_P4=torch.zeros(1, 4, dtype=torch.int32, device="cuda")),
        case.scale,
        out_TND,
    )
    assert (out_TND == UNWRITTEN).all()
