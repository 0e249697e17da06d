"""What the prefill attention of Hopper is given: which tiles in which order, and which caches.

And what `attend` gives to it and to the kernels beside it, for which the references stand in.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_engine.ops import attention, hopper
from moe_engine.ops.attention import HeadNorms
from moe_engine.ops.paged_batch import PagedBatch
from moe_engine.ops.prefill_attention import (
    MAX_SPAN_TILES,
    MAX_SPANS,
    STEP_TOKENS,
    PrefillTiles,
    QueryPreparation,
    order_tiles,
    stage_tiles,
    takes,
    tile_tokens,
)
from moe_engine.ops.prefill_plan import PrefillSpan
from moe_engine.ops.reference import attention as reference
from moe_engine.ops.reference.rope import apply_rope
from moe_engine.ops.rope import RopeTable, norm_rope_write
from tests.kernels.paged import Case, make_case, with_a_shared_prefix
from tests.unit.hopper_on_cpu import choose_as_on_hopper
from tests.unit.test_prefill_plan import spans, whole


def checked_order(
    planned: list[PrefillSpan], first_table_row: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """`order_tiles`, which has every tile of every span once, the longest contexts first."""
    table, tiles = order_tiles(planned, first_table_row, tokens)
    assert (table.dtype, tiles.dtype) == (np.int32, np.uint32)
    assert table.shape == (len(planned), 4)
    steps, found = [], []
    for tile in tiles.tolist():
        index, number = tile >> 16, tile & 0xFFFF
        first_row, query_len, context_len, table_row = table[index].tolist()
        assert planned[index] == PrefillSpan(first_row, query_len, context_len)
        assert table_row == first_table_row + index
        found.append((index, number))
        end = context_len - query_len + min((number + 1) * tokens, query_len)
        steps.append(-(-end // STEP_TOKENS))
    assert steps == sorted(steps, reverse=True)
    assert sorted(found) == [
        (index, number)
        for index, span in enumerate(planned)
        for number in range(-(-span.query_len // tokens))
    ]
    return table, tiles


def test_no_span_has_no_tile() -> None:
    checked_order([], 3, 16)


def test_the_docstrings_example() -> None:
    _, tiles = checked_order(whole(20, 40), 0, 16)
    assert tiles.tolist() == [0, 1, 1 << 16, 1 << 16 | 1, 1 << 16 | 2]


def test_the_longest_context_comes_first_and_equal_ones_stay_in_order() -> None:
    """Tiles of 128 tokens: of 1 step; of 1, 2 and 3 steps; of 9; of 8."""
    table, order = checked_order(spans([(100, 100), (300, 300), (40, 1060), (20, 1024)]), 5, 128)
    assert table.tolist() == [
        [0, 100, 100, 5],
        [100, 300, 300, 6],
        [400, 40, 1060, 7],
        [440, 20, 1024, 8],
    ]
    tiles = [(tile >> 16, tile & 0xFFFF) for tile in order.tolist()]
    assert tiles == [(2, 0), (3, 0), (1, 2), (1, 1), (0, 0), (1, 0)]


def test_a_tile_counts_up_to_its_own_last_token() -> None:
    """Not to the span's last: of 16 tokens before position 128 and 16 behind, the first ends one
    step earlier, and so does a tile that is filled up past its context."""
    _, tiles = checked_order(spans([(32, 144), (10, 128)]), 0, 16)
    assert tiles.tolist() == [1, 0, 1 << 16]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 5000)), max_size=200),
    st.integers(0, 300),
    st.sampled_from([16, 32, 64, 128]),
)
def test_any_spans(lens: list[tuple[int, int]], first_table_row: int, tokens: int) -> None:
    planned = spans([(query_len, before + query_len) for query_len, before in lens])
    checked_order(planned, first_table_row, tokens)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "tokens"),
    [(32, 4, 16), (16, 1, 16), (8, 2, 32), (6, 1, 64), (12, 1, 32), (5, 5, 128), (9, 3, 128)],
)
def test_a_tile_is_up_to_8_query_heads_of_a_kv_head(
    num_heads: int, num_kv_heads: int, tokens: int
) -> None:
    assert tile_tokens(num_heads, num_kv_heads) == tokens


def test_more_spans_or_tiles_of_a_span_than_a_number_has_room_for_are_refused() -> None:
    _, tiles = order_tiles(whole(MAX_SPAN_TILES), 0, 1)
    assert len(tiles) == 1 << 16
    with pytest.raises(AssertionError):
        order_tiles(whole(MAX_SPAN_TILES + 1), 0, 1)
    _, tiles = order_tiles(whole(*[2] * MAX_SPANS), 0, 16)
    assert tiles[-1] >> 16 == MAX_SPANS - 1
    with pytest.raises(AssertionError):
        order_tiles(whole(*[2] * (MAX_SPANS + 1)), 0, 16)


def test_a_step_orders_its_tiles_once_for_all_layers() -> None:
    nothing = torch.empty(0)
    batch = PagedBatch(nothing, nothing, nothing, nothing, 3, tuple(whole(40, 40)))
    tiles = batch.prefill_tiles(16)
    assert batch.prefill_tiles(16) is tiles
    assert tiles.spans_P4[:, 3].tolist() == [3, 4]
    assert (len(tiles.tiles_M), tiles.num_tiles_1.tolist()) == (6, [6])
    assert len(batch.prefill_tiles(32).tiles_M) == 4


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(2, 90), st.integers(0, 300)), max_size=9),
    st.integers(0, 5),
    st.sampled_from([16, 128]),
)
def test_what_only_the_device_knows_can_be_read_back(
    lens: list[tuple[int, int]], num_decodes: int, tokens: int
) -> None:
    """Some of the decodes there may be are none; more tiles than there are have room."""
    planned = spans([(query_len, before + query_len) for query_len, before in lens])
    num_tokens = 5 + sum(span.query_len for span in planned)
    tables_SB = torch.arange(5 + len(lens))[:, None].int()
    decode_lens_S = torch.tensor([7] * num_decodes + [0] * (5 + len(lens) - num_decodes)).int()
    staged = stage_tiles(planned, num_decodes, tokens, torch.device("cpu"))
    room = torch.full((len(staged.tiles_M) + 3,), -1, dtype=torch.int32)
    room[:-3] = staged.tiles_M
    batch = PagedBatch(
        torch.zeros(num_tokens).long(), tables_SB, decode_lens_S, torch.empty(0), 5, (),
        tiles=replace(staged, tiles_M=room),
    )  # fmt: skip
    assert (batch.num_tokens, batch.has_prefills) == (num_tokens, True)
    known = batch.known()
    assert known.prefills == tuple(planned)
    contexts = [7] * num_decodes + [0] * (5 - num_decodes)
    assert known.context_lens_S.tolist() == contexts + [span.context_len for span in planned]
    rows = [0, 1, 2, 3, 4] + [num_decodes + i for i in range(len(lens))]
    assert known.block_tables_SB.flatten().tolist() == rows


def cache(
    block_size: int = 16, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, blocks: int = 2
) -> torch.Tensor:
    """Of 2 KV heads; without memory."""
    return torch.empty(blocks, block_size, 2, head_dim, dtype=dtype, device="meta")


def test_other_dtypes_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_as_on_hopper(monkeypatch)
    assert takes(torch.bfloat16, 8, cache())
    for dtype in (torch.float16, torch.float32):
        assert not takes(dtype, 8, cache(dtype=dtype))
        assert not takes(dtype, 8, cache())
        assert not takes(torch.bfloat16, 8, cache(dtype=dtype))
    assert not takes(torch.bfloat16, 8, cache(dtype=torch.float8_e4m3fn))


def test_as_many_slots_as_an_int_counts_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_as_on_hopper(monkeypatch)
    assert takes(torch.bfloat16, 8, cache(blocks=2**27 - 1))
    assert not takes(torch.bfloat16, 8, cache(blocks=2**27))


def test_the_kernel_says_which_sizes_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "block_size": 16}
    library = SimpleNamespace(prefill_attention_fits=lambda **asked: asked == sizes)
    monkeypatch.setattr(hopper, "extension", lambda device: library)
    assert takes(torch.bfloat16, 8, cache())
    assert not takes(torch.bfloat16, 6, cache())
    assert not takes(torch.bfloat16, 8, cache(head_dim=64))
    assert not takes(torch.bfloat16, 8, cache(block_size=12))


def test_a_cache_on_a_cpu_is_not_taken() -> None:
    assert not takes(torch.bfloat16, 8, torch.empty(2, 16, 2, 128, dtype=torch.bfloat16))


def attend_to_spans(
    q_TND: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    tables_SB: torch.Tensor,
    tiles: PrefillTiles,
    scale: float,
    out_TND: torch.Tensor,
    preparation: QueryPreparation,
) -> None:
    """What the kernel does, by the references."""
    for first, num, context, table_row in tiles.spans_P4.tolist():
        normed_TND = torch.nn.functional.rms_norm(
            q_TND[first : first + num], (16,), preparation.norm_weight_D, preparation.eps
        )
        positions = slice(context - num, context)
        out_TND[first : first + num] = reference.paged_attention(
            apply_rope(normed_TND, preparation.cos_PF[positions], preparation.sin_PF[positions]),
            *cache,
            tables_SB[table_row : table_row + 1],
            torch.tensor([context]),
            [(0, num)],
            scale,
        )


def attend_to_decodes(
    qkv_SX: torch.Tensor,
    norms: HeadNorms,
    rope: RopeTable,
    positions_T: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    scale: float,
    out_SND: torch.Tensor,
) -> None:
    """The same of the rows before the spans'."""
    num = batch.num_decodes
    assert len(qkv_SX) == len(out_SND) == num
    q_SND = norm_rope_write(
        qkv_SX, norms.q_weight_D, norms.k_weight_D, norms.eps, rope, positions_T[:num], cache,
        batch.slots_T[:num],
    )  # fmt: skip
    tables_SB, contexts_S = batch.block_tables_SB[:num], batch.context_lens_S[:num]
    out_SND[:] = reference.paged_attention(
        q_SND, *cache, tables_SB, contexts_S, batch.rows[:num], scale
    )


MIXED = [(1, 7), (1, 16), (1, 70), (9, 20), (2, 2), (40, 40)]


def with_static_tiles(batch: PagedBatch) -> PagedBatch:
    """The same as in a CUDA graph: any row that there is a table for might be a decode."""
    tiles = stage_tiles(batch.prefills, batch.num_decodes, 64, torch.device("cpu"))
    decode_lens_S = batch.context_lens_S.clone()
    decode_lens_S[batch.num_decodes :] = 0
    num_decodes = len(decode_lens_S)
    return replace(
        batch, context_lens_S=decode_lens_S, num_decodes=num_decodes, prefills=(), tiles=tiles
    )


@pytest.mark.parametrize(
    "case",
    [
        make_case(MIXED, device="cpu"),
        make_case(MIXED[3:], device="cpu"),
        # The scheduler offers blocks that a step fills with several positions to the same step.
        with_a_shared_prefix(make_case([(1, 33), (40, 40)], device="cpu")),
    ],
    ids=["mixed", "prompts", "shared prefix"],
)
@pytest.mark.parametrize("is_static", [False, True])
def test_attend_shares_out_the_projection(
    case: Case, is_static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes, keys and values, and raw queries; what `norm_rope_write` is given stays aligned."""
    pointers: list[int] = []

    def write(*args: torch.Tensor) -> torch.Tensor:
        pointers.extend(args[i].data_ptr() for i in (0, 5, 7))
        return norm_rope_write(*args)

    norms = HeadNorms(*torch.rand(2, 16), 1e-6)
    angles_PF = torch.rand(100, 8)
    rope = RopeTable(angles_PF.cos(), angles_PF.sin())
    qkv_TX = torch.randn(case.batch.num_tokens, 8 * 16)
    caches = [(case.cache[0].clone(), case.cache[1].clone()) for _ in range(2)]
    rest = case.batch, case.scale
    expected_TND = attention.attend(qkv_TX, norms, rope, case.positions_T, caches[0], *rest)
    monkeypatch.setattr(attention, "_attend_raw_decodes", attend_to_decodes)
    monkeypatch.setattr(attention.prefill_attention, "prefill_attention", attend_to_spans)
    monkeypatch.setattr(attention, "norm_rope_write", write)
    if is_static:
        rest = with_static_tiles(case.batch), case.scale
    out_TND = attention._attend_on_hopper(qkv_TX, norms, rope, case.positions_T, caches[1], *rest)
    torch.testing.assert_close(out_TND, expected_TND)
    for ours, theirs in zip(caches[1], caches[0], strict=True):
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
    # Triton compiles another variant for arrays that begin elsewhere.
    assert not [pointer for pointer in pointers if pointer % 16]
