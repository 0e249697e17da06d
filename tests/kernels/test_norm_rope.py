"""Head norms, rotation and cache writes: the Triton kernel against the reference.

On a machine without a GPU, the kernel runs in Triton's interpreter.

Legend: T tokens, N query heads, G KV heads, D head dimension, P positions, F = D / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from moe_engine.ops import rope
from moe_engine.ops.reference import rope as reference
from tests.kernels.triton_device import DEVICE, needs_gpu, needs_triton

pytestmark = needs_triton

NUM_POSITIONS = 64
EPS = 1e-6
# A unit in the last place of the result; the interpreter cuts float32 off to bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# (N, G, D): plain, Qwen3's on one rank of four, no power of two, one head for each.
HEADS = [(4, 2, 16), (8, 1, 128), (6, 2, 80), (3, 3, 64)]


@dataclass(frozen=True)
class Inputs:
    qkv_TX: torch.Tensor
    q_weight_D: torch.Tensor
    k_weight_D: torch.Tensor
    table: rope.RopeTable
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    num_kv_heads: int

    def cache(self, block_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values full of NaN."""
        shape = (self.num_slots // block_size, block_size, self.num_kv_heads, len(self.q_weight_D))
        poison = torch.full(shape, math.nan, device=DEVICE).to(dtype)
        return poison, poison.clone()

    def own_kv(self) -> torch.Tensor:
        """Room for the tokens' own keys and values, full of NaN."""
        shape = (2, len(self.slots_T), self.num_kv_heads, len(self.q_weight_D))
        return torch.full(shape, math.nan, device=DEVICE).to(self.q_weight_D.dtype)

    @property
    def num_slots(self) -> int:
        return 16 * (len(self.slots_T) // 16 + 2)


def make_inputs(
    num_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, padding: float = 0.2
) -> Inputs:
    num_heads, num_kv_heads, head_dim = heads
    width = (num_heads + 2 * num_kv_heads) * head_dim
    angles = torch.rand(NUM_POSITIONS, head_dim // 2) * 7
    num_slots = 16 * (num_tokens // 16 + 2)
    slots_T = torch.randperm(num_slots)[:num_tokens]
    slots_T[torch.rand(num_tokens) < padding] = -1
    return Inputs(
        qkv_TX=(torch.randn(num_tokens, width) * 3).to(dtype).to(DEVICE),
        q_weight_D=(1 + 0.3 * torch.randn(head_dim)).to(dtype).to(DEVICE),
        k_weight_D=(1 + 0.3 * torch.randn(head_dim)).to(dtype).to(DEVICE),
        table=rope.RopeTable(angles.cos().to(DEVICE), angles.sin().to(DEVICE)),
        positions_T=torch.randint(0, NUM_POSITIONS, (num_tokens,)).to(DEVICE),
        slots_T=slots_T.to(DEVICE),
        num_kv_heads=num_kv_heads,
    )


def run_kernel(
    inputs: Inputs, cache: tuple[torch.Tensor, torch.Tensor], **how: object
) -> torch.Tensor:
    from moe_engine.kernels import norm_rope as kernels

    return kernels.norm_rope_write(
        inputs.qkv_TX,
        inputs.q_weight_D,
        inputs.k_weight_D,
        EPS,
        inputs.table.cos_PF,
        inputs.table.sin_PF,
        inputs.positions_T,
        *cache,
        inputs.slots_T,
        **how,
    )


def run_reference(
    inputs: Inputs,
    cache: tuple[torch.Tensor, torch.Tensor],
    own_kv_2TGD: torch.Tensor | None = None,
) -> torch.Tensor:
    return reference.norm_rope_write(
        inputs.qkv_TX,
        inputs.q_weight_D,
        inputs.k_weight_D,
        EPS,
        (inputs.table.cos_PF, inputs.table.sin_PF),
        inputs.positions_T,
        *cache,
        inputs.slots_T,
        own_kv_2TGD,
    )


def check(inputs: Inputs, block_size: int = 16, with_own: bool = False, **how: object) -> None:
    dtype = inputs.qkv_TX.dtype
    caches = inputs.cache(block_size, dtype), inputs.cache(block_size, dtype)
    before = inputs.qkv_TX.clone()
    own_kv = [inputs.own_kv() if with_own else None for _ in caches]
    q_TND = run_kernel(inputs, caches[0], own_kv_2TGD=own_kv[0], **how)
    expected_TND = run_reference(inputs, caches[1], own_kv[1])
    assert torch.equal(inputs.qkv_TX, before)
    assert q_TND.dtype == dtype
    # A rotated element is a difference of two, whose errors count as a share of the head's size.
    close = {"rtol": TOLERANCE[dtype], "atol": 4 * TOLERANCE[dtype]}
    torch.testing.assert_close(q_TND, expected_TND, **close)
    # NaN where nothing is written, in both.
    torch.testing.assert_close(caches[0][0], caches[1][0], equal_nan=True, **close)
    assert torch.equal(caches[0][1].nan_to_num(7), caches[1][1].nan_to_num(7)), "values are copied"
    if with_own:
        torch.testing.assert_close(own_kv[0], own_kv[1], **close)
        there = inputs.slots_T >= 0
        for cached, own_TGD in zip(caches[0], own_kv[0], strict=True):
            written = cached.flatten(0, 1)[inputs.slots_T[there]]
            assert torch.equal(written, own_TGD[there]), "the same bits"


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_matches_the_reference(
    num_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check(make_inputs(num_tokens, heads, dtype))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_leaves_the_tokens_own_keys_and_values_as_they_are_cached(
    num_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check(make_inputs(num_tokens, heads, dtype), with_own=True)


@pytest.mark.parametrize("launch", [(8, 1, 2), (16, 1, 4), (8, 4, 4), (2, 2, 1)])
def test_every_launch_computes_the_same(launch: tuple[int, int, int]) -> None:
    check(make_inputs(7, (8, 2, 16), torch.float32), with_own=True, launch=launch)


@pytest.mark.parametrize("num_parts", [1, 4])
def test_parts_of_the_projection_are_summed(num_parts: int) -> None:
    inputs = make_inputs(7, (4, 2, 16), torch.float32)
    parts = torch.randn(num_parts, *inputs.qkv_TX.shape, device=DEVICE)
    caches = inputs.cache(16, torch.float32), inputs.cache(16, torch.float32)
    own_kv = inputs.own_kv(), inputs.own_kv()
    q_TND = run_kernel(replace(inputs, qkv_TX=parts), caches[0], own_kv_2TGD=own_kv[0])
    expected_TND = run_reference(replace(inputs, qkv_TX=parts.sum(0)), caches[1], own_kv[1])
    torch.testing.assert_close(q_TND, expected_TND, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own_kv[0], own_kv[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(caches[0], caches[1], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("block_size", [1, 16])
def test_block_size_does_not_matter(block_size: int) -> None:
    check(make_inputs(6, (4, 2, 16), torch.float32), block_size=block_size)


def test_padding_rows_write_nothing() -> None:
    inputs = make_inputs(9, (4, 2, 16), torch.float32, padding=1.1)
    cache = inputs.cache(16, torch.float32)
    q_TND = run_kernel(inputs, cache)
    assert all(tensor.isnan().all() for tensor in cache)
    assert q_TND.isfinite().all()


def test_rows_may_lie_apart() -> None:
    inputs = make_inputs(5, (4, 2, 16), torch.float32)
    wide = torch.full((5, inputs.qkv_TX.shape[1] + 32), math.nan, device=DEVICE)
    wide[:, 16:-16] = inputs.qkv_TX
    apart = Inputs(**{**vars(inputs), "qkv_TX": wide[:, 16:-16]})
    caches = inputs.cache(16, torch.float32), inputs.cache(16, torch.float32)
    assert torch.equal(run_kernel(apart, caches[0]), run_kernel(inputs, caches[1]))


def check_keys_and_values_alone(inputs: Inputs) -> None:
    """From columns of the projection without its query heads, the cache gets the same bits."""
    dtype, head_dim = inputs.qkv_TX.dtype, len(inputs.q_weight_D)
    alone = replace(inputs, qkv_TX=inputs.qkv_TX[:, -2 * inputs.num_kv_heads * head_dim :])
    caches = inputs.cache(16, dtype), inputs.cache(16, dtype)
    run_kernel(inputs, caches[0])
    q_TND = run_kernel(alone, caches[1])
    assert q_TND.shape == (len(inputs.slots_T), 0, head_dim)
    for whole, part in zip(*caches, strict=True):
        assert torch.equal(whole.view(torch.uint8), part.view(torch.uint8))
    check(alone)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_keys_and_values_alone(
    num_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check_keys_and_values_alone(make_inputs(num_tokens, heads, dtype))


# Triton's interpreter rounds to float8 without the carry.
@needs_gpu
def test_a_narrower_cache_gets_rounded_values() -> None:
    inputs = make_inputs(6, (4, 2, 16), torch.float16, padding=0)
    narrow, wide = (inputs.cache(16, dtype) for dtype in (torch.float8_e4m3fn, torch.float16))
    run_kernel(inputs, narrow)
    run_reference(inputs, wide)
    for ours, theirs in zip(narrow, wide, strict=True):
        # Three bits of mantissa; the smallest step is 2^-9.
        torch.testing.assert_close(
            ours.to(torch.float16), theirs, rtol=2**-4, atol=2**-9, equal_nan=True
        )


@needs_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 256, 513, 3001])
def test_model_sizes_on_a_gpu(num_tokens: int, dtype: torch.dtype) -> None:
    check(make_inputs(num_tokens, (32, 4, 128), dtype), with_own=True, use_pdl=True)
    check(make_inputs(num_tokens, (32, 4, 128), dtype))
    check_keys_and_values_alone(make_inputs(num_tokens, (32, 4, 128), dtype))


@needs_gpu
def test_cuda_tensors_take_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_engine.kernels import norm_rope as kernels

    calls: list[int] = []
    monkeypatch.setattr(kernels, "norm_rope_write", lambda *args, **how: calls.append(1))
    inputs = make_inputs(2, (4, 2, 16), torch.bfloat16)
    rope.norm_rope_write(
        inputs.qkv_TX,
        inputs.q_weight_D,
        inputs.k_weight_D,
        EPS,
        inputs.table,
        inputs.positions_T,
        inputs.cache(16, torch.bfloat16),
        inputs.slots_T,
    )
    assert calls == [1]


@needs_gpu
def test_cache_offsets_pass_two_to_the_31() -> None:
    """The last block of caches of 2^31 elements and a bit."""
    inputs = make_inputs(8, (4, 1, 128), torch.bfloat16, padding=0)
    num_blocks = 2**31 // (16 * 128) + 1
    cache = [
        torch.empty(num_blocks, 16, 1, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    ]
    slots_T = (num_blocks - 1) * 16 + torch.randperm(16, device="cuda")[:8]
    far = Inputs(**{**vars(inputs), "slots_T": slots_T})
    run_kernel(far, (cache[0], cache[1]))
    near = Inputs(**{**vars(inputs), "slots_T": slots_T % 16})
    expected = near.cache(16, torch.bfloat16)
    run_kernel(near, expected)
    rows = slots_T % 16
    for ours, theirs in zip(cache, expected, strict=True):
        assert torch.equal(ours[-1, rows], theirs[0, rows])
