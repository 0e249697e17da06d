"""Decode attention: the Triton kernel against the reference, and its bits against themselves.

On a machine without a GPU, the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moe_engine.ops import attention
from moe_engine.ops.reference import rope as rope_reference
from moe_engine.ops.rope import RopeTable, norm_rope_write
from tests.kernels.paged import Case, expected, make_case
from tests.kernels.triton_device import DEVICE, HAS_TRITON, INTERPRETED, needs_gpu, needs_triton

pytestmark = needs_triton
if HAS_TRITON:
    from moe_engine.kernels.launch import supports_pdl
    from moe_engine.kernels.norm_rope import norm_rope_write as write_kernel
    from moe_engine.kernels.paged_decode import paged_decode
    from moe_engine.kernels.paged_decode_table import DecodeLaunch, DecodeTiles

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Outputs are averages of values around 1; the weights are rounded to the dtype as well.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
FP8 = torch.float8_e4m3fn
# Padding, one token, around the ends of blocks and tiles of 16, several tiles a chunk.
CONTEXTS = [0, 1, 15, 16, 17, 64, 65, 130, 0]
# Launches that share the chunks out differently.
SPLITS = [(1, 1), (6, 16), (3, 16), (2, 64), (5, 1)]
# Every dtype and every shape of heads (query heads, KV heads, head_dim).
KINDS = [
    (torch.bfloat16, (2, 2, 64)),
    (torch.bfloat16, (16, 1, 16)),
    (torch.float16, (6, 2, 32)),
    (torch.float16, (8, 1, 80)),
    (torch.float32, (4, 1, 128)),
]
SMALL_TILES = {"tile": 16, "num_warps": 4, "max_chunks": 4}


def decodes(contexts: list[int], **shape: object) -> Case:
    return make_case([(1, context) for context in contexts], device=DEVICE, **shape)


def run_kernel(case: Case, **how: object) -> torch.Tensor:
    out_SND = torch.full_like(case.q_TND, math.nan)
    paged_decode(
        case.q_TND,
        *case.cache,
        case.batch.block_tables_SB,
        case.batch.context_lens_S,
        case.scale,
        out_SND,
        **how,
    )
    return out_SND


def check(case: Case, **how: object) -> None:
    out_SND, expected_SND = run_kernel(case, **how), expected(case)
    tolerance = TOLERANCE[case.q_TND.dtype]
    torch.testing.assert_close(out_SND.float(), expected_SND, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("last_arriver", [True, False])
@pytest.mark.parametrize("split", SPLITS)
def test_matches_the_reference_however_it_is_split(
    split: tuple[int, int], last_arriver: bool
) -> None:
    check(
        decodes(CONTEXTS, num_heads=2, num_kv_heads=1),
        tiles=DecodeTiles(**SMALL_TILES),
        launch=DecodeLaunch(*split, merge_unroll=2),
        last_arriver=last_arriver,
    )


@pytest.mark.parametrize(("dtype", "heads"), KINDS)
def test_matches_the_reference_with_the_committed_launch(
    dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    shape = dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads, strict=True))
    check(decodes([1, 130], dtype=dtype, **shape))


@pytest.mark.parametrize("block_size", [1, 2, 64, 256])
def test_matches_the_reference_with_blocks_smaller_and_larger_than_a_tile(block_size: int) -> None:
    case = decodes([3, 64, 65], num_heads=2, num_kv_heads=1, block_size=block_size)
    check(case, tiles=DecodeTiles(**SMALL_TILES), launch=DecodeLaunch(2, 16))


@pytest.mark.parametrize("num_sequences", [0, 1])
def test_few_sequences(num_sequences: int) -> None:
    check(decodes([70] * num_sequences, num_kv_heads=1))


def test_padding_rows_give_zeros() -> None:
    out_SND = run_kernel(decodes([5, 0, 0], num_kv_heads=1))
    assert out_SND[0].any()
    assert not out_SND[1:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_cache(dtype: torch.dtype) -> None:
    case = decodes([1, 70], num_kv_heads=1, dtype=dtype, cache_dtype=FP8)
    check(case)
    keys, values = case.cache
    doubled = replace(case, cache=((keys.float() / 2).to(FP8), (values.float() * 2).to(FP8)))
    out_SND = run_kernel(doubled, k_scale=2.0, v_scale=0.5)
    # Halving a small key loses a bit.
    torch.testing.assert_close(out_SND.float(), expected(case), rtol=5e-2, atol=5e-2)


def test_bits_do_not_depend_on_the_split_or_the_batch() -> None:
    contexts = [0, 1, 17, 130]
    case = decodes(contexts, num_kv_heads=1)
    tiles = DecodeTiles(**SMALL_TILES)
    alone = []
    for row in range(len(contexts)):
        batch = replace(
            case.batch,
            block_tables_SB=case.batch.block_tables_SB[row : row + 1],
            context_lens_S=case.batch.context_lens_S[row : row + 1],
        )
        one = replace(case, q_TND=case.q_TND[row : row + 1].contiguous(), batch=batch)
        alone.append(run_kernel(one, tiles=tiles, launch=DecodeLaunch(1, 1)))
    for split in SPLITS[1:]:
        together = run_kernel(case, tiles=tiles, launch=DecodeLaunch(*split))
        assert torch.equal(together, torch.cat(alone)), split


def test_arrival_counters_are_back_at_zero() -> None:
    launch = DecodeLaunch(4, 1)
    case = decodes([130, 64], num_kv_heads=1)
    first = run_kernel(case, tiles=DecodeTiles(**SMALL_TILES), launch=launch)
    assert torch.equal(first, run_kernel(case, tiles=DecodeTiles(**SMALL_TILES), launch=launch))


QWEN3 = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128}
LONG = [0, 1, 63, 64, 65, 576, 1023, 1024, 1025, 2048, 4097, 9000]


@needs_gpu
@pytest.mark.parametrize("cache_dtype", [None, FP8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_model_sizes_on_a_gpu(dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    if cache_dtype is not None and dtype == torch.float32:
        pytest.skip("an fp8 cache goes with half-precision queries")
    for contexts in ([576], LONG, [37 * i for i in range(70)]):
        case = decodes(contexts, dtype=dtype, cache_dtype=cache_dtype, **QWEN3)
        for how in ({}, {"use_pdl": True}, {"last_arriver": False, "use_pdl": True}):
            check(case, **how)


@needs_gpu
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(16, 1, 128, 16), (4, 4, 64, 32), (8, 1, 128, 256), (8, 2, 80, 1), (5, 1, 256, 16)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_shapes_on_a_gpu(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    check(decodes(LONG, dtype=dtype, block_size=block_size, **shape))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_bucket_on_a_gpu(dtype: torch.dtype) -> None:
    case = decodes(LONG, dtype=dtype, **QWEN3)
    reference = run_kernel(case, launch=DecodeLaunch(1, 1))
    for launch in (
        DecodeLaunch(16, 64),
        DecodeLaunch(16, 64, num_stages=3, merge_unroll=16),
        DecodeLaunch(8, 512),
        DecodeLaunch(3, 2000, num_stages=2),
    ):
        for last_arriver in (True, False):
            for _ in range(10):
                out = run_kernel(case, launch=launch, last_arriver=last_arriver)
                assert torch.equal(out, reference), (launch, last_arriver)


@needs_gpu
def test_a_captured_graph_follows_its_inputs() -> None:
    """Fresh queries, contexts and tables in the same tensors, the last arriver merging."""
    case = decodes([576, 1, 2048, 0], dtype=torch.bfloat16, **QWEN3)
    how = {"launch": DecodeLaunch(16, 64), "use_pdl": True}
    run_kernel(case, **how)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_SND = run_kernel(case, **how)
    order = torch.tensor([2, 0, 3, 1], device="cuda")
    for _ in range(3):
        case.q_TND.copy_(torch.randn_like(case.q_TND))
        case.batch.context_lens_S.copy_(case.batch.context_lens_S[order].clone())
        case.batch.block_tables_SB.copy_(case.batch.block_tables_SB[order].clone())
        graph.replay()
        torch.testing.assert_close(out_SND.float(), expected(case), rtol=2e-2, atol=2e-2)


@needs_gpu
def test_offsets_pass_two_to_the_31_on_a_gpu() -> None:
    """The contexts lie in the last blocks of caches of more than 2^31 elements."""
    case = decodes([300, 40], dtype=torch.bfloat16, **QWEN3)
    keys, values = case.cache
    num_blocks = 2**31 // keys[0].numel() + keys.shape[0]
    far = [torch.empty(num_blocks, *keys.shape[1:], dtype=keys.dtype, device="cuda") for _ in "kv"]
    far[0][-keys.shape[0] :], far[1][-keys.shape[0] :] = keys, values
    tables = case.batch.block_tables_SB + num_blocks - keys.shape[0]
    moved = replace(case, cache=(far[0], far[1]), batch=replace(case.batch, block_tables_SB=tables))
    assert torch.equal(run_kernel(moved), run_kernel(case))


@needs_gpu
def test_cuda_tensors_take_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_engine.kernels import paged_decode as kernels

    calls: list[int] = []
    monkeypatch.setattr(kernels, "paged_decode", lambda *args, **how: calls.append(1))
    case = decodes([5], dtype=torch.bfloat16)
    attention.paged_attention(case.q_TND, case.cache, case.batch, case.scale)
    assert calls == [1]


def prepared(
    case: Case, num_parts: int, rope_dim: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A projection [num_parts, S, X] for the case, and what `paged_decode` prepares it with."""
    num_sequences, num_heads, head_dim = case.q_TND.shape
    num_kv_heads = case.cache[0].shape[2]
    parts = torch.randn(num_parts, num_sequences, (num_heads + 2 * num_kv_heads) * head_dim)
    weights = (torch.rand(2, head_dim) + 0.5).to(case.q_TND.dtype)
    angles_PF = torch.rand(400, rope_dim)
    positions_S = (case.batch.context_lens_S - 1).clamp(min=0).to(torch.int64)
    prepare = (*weights, angles_PF.cos(), angles_PF.sin(), positions_S, case.batch.slots_T)
    return parts.to(DEVICE), tuple(tensor.to(DEVICE) for tensor in prepare)


# Dtype, the cache's dtype if it is another, parts of the projection, and heads.
PREPARED = [
    (torch.float32, None, 1, (8, 1, 16)),
    (torch.float32, None, 4, (4, 4, 32)),
    (torch.bfloat16, None, 8, (6, 2, 32)),
    (torch.float16, None, 1, (16, 1, 16)),
    # Triton's interpreter rounds to float8 without the carry.
    pytest.param(torch.bfloat16, FP8, 1, (4, 2, 24), marks=needs_gpu),
]


@pytest.mark.parametrize(("dtype", "cache_dtype", "num_parts", "heads"), PREPARED)
def test_prepares_the_new_tokens_as_norm_rope_write_does(
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    num_parts: int,
    heads: tuple[int, int, int],
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    case = decodes(
        [0, 1, 17, 65, 130, 0],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    parts, prepare = prepared(case, num_parts, head_dim // 2)
    qkv = parts if num_parts > 1 else parts[0].to(dtype)
    summed = attention.SplitSums(parts, dtype).summed()
    q_weight_D, k_weight_D, cos_PF, sin_PF, positions_S, slots_S = prepare
    expected_cache = tuple(tensor.to(dtype) for tensor in case.cache)
    q_SND = rope_reference.norm_rope_write(
        summed,
        q_weight_D,
        k_weight_D,
        1e-6,
        (cos_PF, sin_PF),
        positions_S,
        *expected_cache,
        slots_S,
    )
    expected_cache = tuple(tensor.to(cache_dtype or dtype) for tensor in expected_cache)
    expected_SND = expected(replace(case, q_TND=q_SND, cache=expected_cache))
    cache = tuple(tensor.clone() for tensor in case.cache)
    out_SND = torch.full_like(case.q_TND, math.nan)
    for launch in (None, DecodeLaunch(num_splits=3, min_tokens=16)):
        paged_decode(
            qkv,
            *cache,
            case.batch.block_tables_SB,
            case.batch.context_lens_S,
            case.scale,
            out_SND,
            prepare=prepare,
            eps=1e-6,
            tiles=DecodeTiles(**SMALL_TILES),
            launch=launch,
            use_pdl=not INTERPRETED and supports_pdl(out_SND.device),
        )
        tolerance = 2 * TOLERANCE[dtype] if cache_dtype is None else 6e-2
        torch.testing.assert_close(out_SND.float(), expected_SND, rtol=tolerance, atol=tolerance)
        # Rounded twice, by the reference to the dtype first: an eighth is one step of float8.
        rtol = tolerance if cache_dtype is None else 0.13
        for ours, theirs in zip(cache, expected_cache, strict=True):
            torch.testing.assert_close(
                ours.float(), theirs.float(), rtol=rtol, atol=tolerance, equal_nan=True
            )


@pytest.mark.parametrize("launch", [None, (3, 16)])
def test_prompts_among_the_rows_keep_their_keys_and_values(launch: tuple[int, int] | None) -> None:
    """They have slots, whose content is there already, and here a context of 0."""
    contexts, are_decodes = [17, 5, 65, 20], torch.tensor([True, False, True, False])
    case = decodes(contexts, num_heads=2, num_kv_heads=1, head_dim=128)
    parts, prepare = prepared(case, 1, 64)
    q_weight_D, k_weight_D, cos_PF, sin_PF, positions_S, slots_S = prepare
    cache = tuple(tensor.clone() for tensor in case.cache)
    q_SND = write_kernel(
        parts[0], q_weight_D, k_weight_D, 1e-6, cos_PF, sin_PF, positions_S, *cache, slots_S
    )
    expected_SND = expected(replace(case, q_TND=q_SND, cache=cache))
    ours = tuple(tensor.clone() for tensor in cache)
    out_SND = torch.full_like(case.q_TND, math.nan)
    paged_decode(
        parts[0],
        *ours,
        case.batch.block_tables_SB,
        case.batch.context_lens_S * are_decodes.to(DEVICE),
        case.scale,
        out_SND,
        prepare=prepare,
        eps=1e-6,
        tiles=DecodeTiles(**SMALL_TILES),
        launch=launch and DecodeLaunch(*launch),
    )
    for mine, theirs in zip(ours, cache, strict=True):
        assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))
    assert (out_SND[~are_decodes] == 0).all()
    torch.testing.assert_close(
        out_SND[are_decodes], expected_SND[are_decodes], rtol=5e-6, atol=5e-6
    )


@needs_gpu
@pytest.mark.parametrize("num_parts", [1, 4])
@pytest.mark.parametrize(
    "contexts", [[576], [570 + i for i in range(33)], [1, 2100, 0, 64, 65] * 40]
)
def test_the_operator_caches_the_bits_of_norm_rope_write(
    contexts: list[int], num_parts: int
) -> None:
    case = decodes(contexts, num_heads=32, num_kv_heads=4, head_dim=128, dtype=torch.bfloat16)
    parts, prepare = prepared(case, num_parts, 64)
    prepare = (*prepare[:2], *(torch.rand(2, 2200, 64, device=DEVICE)), *prepare[4:])
    rope = RopeTable(*prepare[2:4])
    sums = attention.SplitSums(parts, torch.bfloat16)
    cache = tuple(tensor.clone() for tensor in case.cache)
    q_SND = norm_rope_write(sums.summed(), *prepare[:2], 1e-6, rope, prepare[4], cache, prepare[5])
    expected_SND = attention.paged_attention(q_SND, cache, case.batch, case.scale)
    ours = tuple(tensor.clone() for tensor in case.cache)
    out_SND = attention.attend(
        sums if num_parts > 1 else sums.summed(),
        attention.HeadNorms(*prepare[:2], 1e-6),
        rope,
        prepare[4],
        ours,
        case.batch,
        case.scale,
    )
    # The products' sums are taken in another order; what the cache keeps is the same to the bit.
    torch.testing.assert_close(out_SND, expected_SND, rtol=1e-2, atol=1e-2)
    for mine, theirs in zip(ours, cache, strict=True):
        assert torch.equal(mine.view(torch.int16), theirs.view(torch.int16))
