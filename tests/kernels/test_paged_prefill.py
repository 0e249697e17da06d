"""Prefill attention: Triton and cuDNN against the reference, and the operator that picks them.

On a machine without a GPU, the Triton kernel runs in its interpreter. The kernel for Hopper, which
comes before both, is in `test_hopper_prefill`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch.nn.attention import SDPBackend

from moe_engine.ops import attention, cudnn_prefill, prefill_attention, prefill_plan
from moe_engine.ops.attention import paged_attention
from moe_engine.ops.linear import SplitSums
from moe_engine.ops.paged_batch import NeededRows, PagedBatch
from moe_engine.ops.reference import rope as rope_reference
from moe_engine.ops.rope import RopeTable, norm_rope_write
from tests.kernels.paged import (
    Case,
    expected,
    in_the_last_blocks,
    make_case,
    with_a_shared_prefix,
)
from tests.kernels.triton_device import DEVICE, HAS_TRITON, needs_gpu, needs_triton

if HAS_TRITON:
    from moe_engine.kernels.paged_prefill import paged_prefill
    from moe_engine.kernels.paged_prefill_table import PrefillTiles

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
    """cuDNN's call with any backend of PyTorch: fill up, attend, cut off."""
    monkeypatch.setattr(cudnn_prefill, "BACKEND", SDPBackend.MATH)
    case = make_case([(prompt_len, prompt_len)] * num_prompts, device="cpu")
    out_TND = cudnn_prefill.attend(case.q_TND, *case.own_kv_2TGD, num_prompts, 8, case.scale)
    torch.testing.assert_close(out_TND, expected(case), rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("prompt_len", [5, 8])
def test_filled_up_prompts_are_of_the_shape_and_the_strides_of_full_ones(
    prompt_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN keeps a plan for each."""
    seen = []

    def look(*tensors: torch.Tensor, **_: object) -> torch.Tensor:
        seen.extend((tensor.shape, tensor.stride()) for tensor in tensors)
        return tensors[0]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    case = make_case([(prompt_len, prompt_len)] * 3, device="cpu")
    cudnn_prefill.attend(case.q_TND, *case.own_kv_2TGD, 3, 8, case.scale)
    q, k = torch.empty(3, 8, 4, 16).transpose(1, 2), torch.empty(3, 8, 2, 16).transpose(1, 2)
    assert seen == [(tensor.shape, tensor.stride()) for tensor in (q, k, k)]


@needs_triton
@pytest.mark.parametrize(
    ("lens", "implementations"),
    [
        ([(1, 7), (1, 0), (10, 10), (3, 20), (16, 16), (2, 2)], ["cudnn", "triton"] * 2),
        ([(12, 12)], ["cudnn"]),
        ([(8, 8)] * 3, ["cudnn"]),
    ],
)
def test_long_prompts_attend_to_the_steps_own_keys_and_values(
    lens: list[tuple[int, int]], implementations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any backend of PyTorch for cuDNN; what it should not read is NaN."""
    monkeypatch.setattr(cudnn_prefill, "BACKEND", SDPBackend.MATH)
    for name in ("MIN_PROMPT", "PAD", "MIN_EQUAL_PROMPT", "MIN_EQUAL_TOKENS", "EQUAL_MULTIPLE"):
        monkeypatch.setattr(prefill_plan, name, 8)
    case = make_case(lens, device=DEVICE)
    found = [group.implementation.value for group in case.batch.prefill_groups]
    assert found == implementations
    own_kv_2TGD, cache = case.own_kv_2TGD, [tensor.clone() for tensor in case.cache]
    for span in case.batch.prefills:
        rows = slice(span.first_row, span.first_row + span.query_len)
        if span.query_len >= 8:
            for tensor in cache:
                tensor.flatten(0, 1)[case.batch.slots_T[rows]] = math.nan
        else:
            own_kv_2TGD[:, rows] = math.nan
    out_TND = attention._on_gpu(case.q_TND, tuple(cache), case.batch, case.scale, own_kv_2TGD)
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


@pytest.fixture
def without_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator attends as on GPUs that our kernel for Hopper does not run on."""
    monkeypatch.setattr(prefill_attention, "takes", lambda *_: False)


@needs_gpu
@pytest.mark.usefixtures("without_hopper")
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
    if "cudnn" in implementations and not cudnn_prefill.usable(dtype, 32, case.cache[0]):
        pytest.skip("needs cuDNN attention")
    found = [group.implementation.value for group in case.batch.prefill_groups]
    assert found == implementations
    rest = (case.cache, case.batch, case.scale)
    expected_TND, tolerance = expected(case), TOLERANCE[dtype]
    for own_kv_2TGD in (case.own_kv_2TGD, None):
        out_TND = paged_attention(case.q_TND, *rest, own_kv_2TGD)
        torch.testing.assert_close(out_TND.float(), expected_TND, rtol=tolerance, atol=tolerance)


from_the_projection_on = pytest.mark.parametrize(
    "lens", [[(1500, 1500)], [(1, 40), (1030, 1030), (100, 900)], [(9, 9)]]
)


@pytest.fixture
def num_rows_attended(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many rows each call of cuDNN and of the kernel for Hopper was given."""
    calls: dict[str, list[int]] = {"cudnn": [], "hopper": []}

    def record(name: str, module: ModuleType, function: str) -> None:
        attend = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *args: calls[name].append(len(args[0])) or attend(*args)
        )

    record("cudnn", cudnn_prefill, "attend")
    record("hopper", prefill_attention, "prefill_attention")
    return calls


@needs_gpu
@pytest.mark.usefixtures("without_hopper")
@pytest.mark.parametrize("cache_dtype", [None, FP8])
@from_the_projection_on
def test_from_the_projection_on_prompts_get_what_is_cached(
    lens: list[tuple[int, int]],
    cache_dtype: torch.dtype | None,
    num_rows_attended: dict[str, list[int]],
) -> None:
    """cuDNN has the long whole prompts."""
    dtype = torch.bfloat16
    case = make_case(lens, device="cuda", dtype=dtype, cache_dtype=cache_dtype, **QWEN3)
    if not cudnn_prefill.usable(dtype, 32, case.cache[0].to(dtype)):
        pytest.skip("needs cuDNN attention")
    check_from_the_projection_on(case)
    long = [num for num, end in lens if num == end and num >= prefill_plan.MIN_PROMPT]
    assert num_rows_attended == {"cudnn": [] if cache_dtype else long, "hopper": []}


@pytest.mark.usefixtures("needs_hopper")
@from_the_projection_on
def test_from_the_projection_on_prompts_get_what_is_cached_on_hopper(
    lens: list[tuple[int, int]], num_rows_attended: dict[str, list[int]]
) -> None:
    """Our kernel has all prompts, in one launch with the step's queries."""
    case = make_case(lens, device="cuda", dtype=torch.bfloat16, **QWEN3)
    check_from_the_projection_on(case)
    assert num_rows_attended == {"cudnn": [], "hopper": [case.batch.num_tokens]}


# Prompts and chunks beside decodes, of which there are none, one, and so many that they are
# attended to by another kernel than few.
MIXED = [[], [(1, 333)], [(1, 20 * n) for n in range(1, 40)]]


@needs_gpu
@pytest.mark.parametrize("decodes", MIXED, ids=len)
@pytest.mark.parametrize("needed", ["all", "last", "some"])
@pytest.mark.parametrize("num_parts", [0, 3])
def test_from_the_projection_on_steps_of_all_kinds(
    num_parts: int, needed: str, decodes: list[tuple[int, int]]
) -> None:
    """All rows are needed, or those at the ends of the sequences alone, or also others."""
    lens = [*decodes, (70, 70), (33, 400), (2, 35)]
    case = make_case(lens, device="cuda", dtype=torch.bfloat16, **QWEN3)
    check_from_the_projection_on(case, num_parts, needed_rows(case.batch, needed))


@needs_gpu
@pytest.mark.parametrize("needed", ["all", "last"])
@pytest.mark.parametrize("num_decodes", [1, 6, 40])
def test_a_decode_sees_what_a_prompt_of_the_same_step_caches(num_decodes: int, needed: str) -> None:
    """The scheduler offers blocks that a step fills with several positions to the same step."""
    lens = [(1, 97)] * num_decodes + [(200, 200)]
    case = with_a_shared_prefix(make_case(lens, device="cuda", dtype=torch.bfloat16, **QWEN3))
    check_from_the_projection_on(case, needed=needed_rows(case.batch, needed))


def needed_rows(batch: PagedBatch, which: str) -> NeededRows | None:
    if which == "all":
        return None
    ends_S = batch.query_starts_S[1:].long() - 1
    if which == "some":
        first = torch.arange(batch.num_decodes, batch.num_decodes + 50, 7, device=ends_S.device)
        return NeededRows(torch.cat([first, ends_S]), None)
    as_decodes = replace(
        batch,
        slots_T=batch.slots_T[ends_S],
        query_starts_S=torch.arange(len(ends_S) + 1, dtype=torch.int32, device=ends_S.device),
        num_decodes=len(ends_S),
        prefills=(),
    )
    return NeededRows(ends_S, as_decodes)


def check_from_the_projection_on(
    case: Case, num_parts: int = 0, needed: NeededRows | None = None
) -> None:
    """`attend` computes what the references do, and caches the bits of `norm_rope_write`."""
    dtype, batch, positions_T = case.q_TND.dtype, case.batch, case.positions_T
    qkv = torch.randn(max(num_parts, 1), batch.num_tokens, 40 * 128, device="cuda")
    given = SplitSums(qkv, dtype) if num_parts else qkv[0].to(dtype)
    norms = attention.HeadNorms(*torch.rand(2, 128, device="cuda").to(dtype), 1e-6)
    weights = norms.q_weight_D, norms.k_weight_D, norms.eps
    angles = torch.rand(2048, 64, device="cuda")
    rope = RopeTable(angles.cos(), angles.sin())
    for tensor in case.cache:  # NaN in both dtypes
        tensor.view(torch.uint8).flatten(0, 1)[batch.slots_T] = 255
    other = tuple(tensor.clone() for tensor in case.cache)
    scratch = torch.empty(2, *case.cache[0].shape, dtype=dtype, device="cuda")
    out_RND = attention.attend(
        given, norms, rope, positions_T, case.cache, batch, case.scale, needed
    )
    norm_rope_write(given, *weights, rope, positions_T, other, batch.slots_T)
    for ours, theirs in zip(case.cache, other, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    qkv_TX = given.summed() if isinstance(given, SplitSums) else given
    q_TND = rope_reference.norm_rope_write(
        qkv_TX, *weights, (rope.cos_PF, rope.sin_PF), positions_T, *scratch, batch.slots_T
    )
    expected_RND = expected(replace(case, q_TND=q_TND))
    if needed is not None:
        expected_RND = expected_RND[needed.rows_R]
    torch.testing.assert_close(out_RND.float(), expected_RND, rtol=2e-2, atol=2e-2)


@needs_gpu
def test_float32_goes_to_triton_on_a_gpu() -> None:
    case = make_case([(1, 5), (1024, 1024)], device="cuda", **QWEN3)
    assert not cudnn_prefill.usable(torch.float32, 32, case.cache[0])
    out_TND = paged_attention(case.q_TND, case.cache, case.batch, case.scale)
    torch.testing.assert_close(out_TND, expected(case), rtol=5e-6, atol=5e-6)


@needs_gpu
def test_offsets_pass_two_to_the_31_on_a_gpu() -> None:
    case = make_case([(70, 300), (40, 40)], device="cuda", dtype=torch.bfloat16, **QWEN3)
    assert torch.equal(run_kernel(in_the_last_blocks(case)), run_kernel(case))
