"""Prefill attention: Triton and cuDNN against the reference, and the operator that picks them.

On a machine without a GPU, the Triton kernel runs in its interpreter.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend

from moe_engine.ops import cudnn_prefill, prefill_plan
from moe_engine.ops.attention import paged_attention
from tests.kernels.paged import Case, expected, make_case

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and HAS_TRITON), reason="needs an NVIDIA GPU and triton"
)
needs_triton = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs triton, and a GPU or TRITON_INTERPRET=1",
)
if HAS_TRITON:
    from moe_engine.kernels.paged_prefill import paged_prefill
    from moe_engine.kernels.paged_prefill_table import PrefillTiles

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
FP8 = torch.float8_e4m3fn
# Whole prompts and chunks; around the ends of blocks of 16, of tiles of 16 keys and of 8 tokens.
LENS = [(2, 2), (3, 33), (16, 16), (17, 64), (40, 40), (33, 100)]
# Every dtype and every shape of heads (query heads, KV heads, head_dim).
KINDS = [
    (torch.bfloat16, (2, 2, 64)),
    (torch.bfloat16, (16, 1, 16)),
    (torch.float16, (6, 2, 32)),
    (torch.float16, (8, 1, 80)),
    (torch.float32, (4, 1, 128)),
]
# (rows, keys, warps, stages)
SMALL_TILES = (16, 16, 4, 2)


def run_kernel(case: Case, **how: object) -> torch.Tensor:
    """Only the prefill spans; rows of decodes stay NaN."""
    out_TND = torch.full_like(case.q_TND, math.nan)
    paged_prefill(
        case.q_TND,
        *case.cache,
        case.batch.block_tables_SB,
        case.batch.context_lens_S,
        case.batch.query_starts_S,
        case.batch.num_decodes,
        [span.query_len for span in case.batch.prefills],
        case.scale,
        out_TND,
        **how,
    )
    return out_TND


def check(case: Case, **how: object) -> None:
    out_TND, first = run_kernel(case, **how), case.batch.num_decodes
    tolerance = TOLERANCE[case.q_TND.dtype]
    torch.testing.assert_close(
        out_TND[first:].float(), expected(case)[first:], rtol=tolerance, atol=tolerance
    )
    assert out_TND[:first].isnan().all()


@needs_triton
@pytest.mark.parametrize("tiles", [SMALL_TILES, (32, 32, 4, 2), (64, 16, 4, 2)])
def test_matches_the_reference_however_it_is_tiled(tiles: tuple[int, int, int, int]) -> None:
    check(make_case(LENS, device=DEVICE), tiles=PrefillTiles(*tiles))


@needs_triton
@pytest.mark.parametrize(("dtype", "heads"), KINDS)
def test_matches_the_reference_with_the_committed_tiles(
    dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    shape = dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads, strict=True))
    check(make_case([(5, 5), (18, 70)], device=DEVICE, dtype=dtype, **shape))


@needs_triton
@pytest.mark.parametrize("block_size", [1, 2, 64, 256])
def test_matches_the_reference_with_blocks_smaller_and_larger_than_a_tile(block_size: int) -> None:
    case = make_case(LENS[1:5], device=DEVICE, block_size=block_size)
    check(case, tiles=PrefillTiles(*SMALL_TILES))


@needs_triton
def test_spans_behind_decodes() -> None:
    check(make_case([(1, 7), (1, 0), (1, 33), (9, 20), (2, 2)], device=DEVICE))


@needs_triton
def test_more_spans_than_the_smallest_search() -> None:
    check(make_case([(2 + i % 3, 5 + i) for i in range(18)], device=DEVICE))


@needs_triton
def test_no_span_is_no_launch() -> None:
    check(make_case([(1, 7)], device=DEVICE))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_cache(dtype: torch.dtype) -> None:
    case = make_case(LENS[:4], device=DEVICE, dtype=dtype, cache_dtype=FP8)
    check(case)
    keys, values = case.cache
    doubled = replace(case, cache=((keys.float() / 2).to(FP8), (values.float() * 2).to(FP8)))
    out_TND = run_kernel(doubled, k_scale=2.0, v_scale=0.5)
    torch.testing.assert_close(out_TND.float(), expected(case), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("prompt_len", [5, 8])
@pytest.mark.parametrize("num_prompts", [1, 3])
def test_padded_whole_prompts_are_exact(
    prompt_len: int, num_prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's call with any backend of PyTorch: gather, fill up, attend, cut off."""
    monkeypatch.setattr(cudnn_prefill, "BACKEND", SDPBackend.MATH)
    case = make_case([(prompt_len, prompt_len)] * num_prompts, device="cpu")
    out_TND = cudnn_prefill.attend(
        case.q_TND, *case.cache, case.batch.slots_T, num_prompts, 8, case.scale
    )
    torch.testing.assert_close(out_TND, expected(case), rtol=5e-6, atol=5e-6)


QWEN3 = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128}


@needs_gpu
@pytest.mark.parametrize("cache_dtype", [None, FP8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_model_sizes_on_a_gpu(dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    if cache_dtype is not None and dtype == torch.float32:
        pytest.skip("an fp8 cache goes with half-precision queries")
    for lens in ([(512, 512)] * 3, [(1, 70), (2, 2), (1000, 1000), (129, 2500), (64, 64)]):
        check(make_case(lens, device=DEVICE, dtype=dtype, cache_dtype=cache_dtype, **QWEN3))


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
    lens = [(3, 3), (200, 200), (129, 700)]
    check(make_case(lens, device=DEVICE, dtype=dtype, block_size=block_size, **shape))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lens", "implementations"),
    [
        ([(512, 512)] * 8, ["cudnn"]),
        ([(1030, 1030)], ["cudnn"]),
        ([(1, 40), (1, 0), (1500, 1500), (70, 70), (100, 900)], ["cudnn", "triton"]),
        ([(1, 40), (300, 300)], ["triton"]),
        ([(1, 40), (1, 600)], []),
    ],
)
def test_the_operator_attends_with_every_implementation(
    lens: list[tuple[int, int]], implementations: list[str], dtype: torch.dtype
) -> None:
    case = make_case(lens, device="cuda", dtype=dtype, **QWEN3)
    if "cudnn" in implementations and not cudnn_prefill.usable(case.q_TND, case.cache[0]):
        pytest.skip("needs cuDNN attention")
    groups = prefill_plan.plan_prefills(case.batch.prefills, True)
    assert [group.implementation.value for group in groups] == implementations
    out_TND = paged_attention(case.q_TND, case.cache, case.batch, case.scale)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out_TND.float(), expected(case), rtol=tolerance, atol=tolerance)


@needs_gpu
def test_float32_goes_to_triton_on_a_gpu() -> None:
    case = make_case([(1, 5), (1024, 1024)], device="cuda", **QWEN3)
    assert not cudnn_prefill.usable(case.q_TND, case.cache[0])
    out_TND = paged_attention(case.q_TND, case.cache, case.batch, case.scale)
    torch.testing.assert_close(out_TND, expected(case), rtol=5e-6, atol=5e-6)


@needs_gpu
def test_offsets_pass_two_to_the_31_on_a_gpu() -> None:
    """The contexts lie in the last blocks of caches of more than 2^31 elements."""
    case = make_case([(70, 300), (40, 40)], device="cuda", dtype=torch.bfloat16, **QWEN3)
    keys, values = case.cache
    num_blocks = 2**31 // keys[0].numel() + keys.shape[0]
    far = [torch.empty(num_blocks, *keys.shape[1:], dtype=keys.dtype, device="cuda") for _ in "kv"]
    far[0][-keys.shape[0] :], far[1][-keys.shape[0] :] = keys, values
    tables = case.batch.block_tables_SB + num_blocks - keys.shape[0]
    moved = replace(case, cache=(far[0], far[1]), batch=replace(case.batch, block_tables_SB=tables))
    assert torch.equal(run_kernel(moved), run_kernel(case))
