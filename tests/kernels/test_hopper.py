"""The CUDA kernels for Hopper at edge shapes, and their bits against themselves.

Legend: R rows, K choices of a row, P = R * K pairs, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_engine.ops import decode_attention, hopper, moe
from moe_engine.ops.decode_attention import Launch
from moe_engine.ops.linear import SplitSums
from moe_engine.ops.reference import moe as reference
from moe_engine.ops.rope import RopeTable, norm_rope_write
from moe_engine.ops.tuning import DecodeChoices
from tests.kernels.decode_cases import LAUNCHES, Decode, on_gpu
from tests.kernels.hopper_cases import (
    STREAMING_CASES,
    TILES,
    all_cases,
    foreseen,
    many_tiles,
    run_grouped,
    run_linear,
    run_streaming,
    scattered,
)

pytestmark = pytest.mark.usefixtures("needs_hopper")

BF16 = torch.bfloat16
CASES = [(f"{kernel}: {name}", run) for kernel, cases in all_cases().items() for name, run in cases]


@pytest.mark.parametrize("run", [run for _, run in CASES], ids=[name for name, _ in CASES])
def test_edge_shape_matches_float32(run: Callable[[], None]) -> None:
    run()


def test_counters_of_experts_are_back_at_zero() -> None:
    """Also where a token has no expert, and where blocks find no tile left."""
    from moe_engine.kernels.launch import arrival_counters

    for case in STREAMING_CASES:
        run_streaming(case)
    for tile in TILES:
        for grouped in (foreseen(tile), *many_tiles()):
            run_grouped(grouped, tile)
    assert not arrival_counters(torch.device("cuda", torch.cuda.current_device())).any()


@pytest.mark.parametrize("tile", TILES)
def test_a_pair_gets_the_same_bits_whoever_shares_its_tile(tile: int) -> None:
    """Of one tile size; a graph bucket always takes the same one."""
    x_RH = torch.randn(90, 512, device="cuda").to(BF16)
    ids_RK = torch.randint(0, 6, (90, 4), dtype=torch.int32, device="cuda")
    gate_up_EJH, down_EHI = (w.cuda() for w in scattered(1, 1, 6, hidden=512).weights())

    def run(rows: slice, sorts: bool) -> torch.Tensor:
        groups = moe.group_by_expert(ids_RK[rows], 6)
        return hopper.grouped_expert_ffn(
            x_RH[rows],
            ids_RK[rows],
            None if sorts else (groups.offsets_E1, groups.pairs_P),
            gate_up_EJH,
            down_EHI,
            tile,
        )

    together_PH = run(slice(0, 90), sorts=False)
    for first, last in ((0, 1), (89, 90), (7, 20), (1, 90), (0, 90)):
        for sorts in (False, True) if hopper.sorts_pairs(ids_RK, 6, tile) else (False,):
            alone_PH = run(slice(first, last), sorts)
            assert torch.equal(alone_PH, together_PH[4 * first : 4 * last])


@pytest.mark.parametrize("num_rows", [4, 64])
def test_experts_that_sort_wait_for_the_router(num_rows: int) -> None:
    """Their kernels begin before those before them have ended; the ids change from call to call."""
    gate_EH = (torch.randn(32, 512, device="cuda") / 22).to(BF16)
    norm_weight_H = torch.ones(512, device="cuda").to(BF16)
    weights = [w.cuda() for w in scattered(1, 1, 32, hidden=512).weights()]
    x_NRH = torch.randn(20, num_rows, 512, device="cuda").to(BF16)

    def run(wait: bool) -> list[torch.Tensor]:
        outputs = []
        for x_RH in x_NRH:
            routed = hopper.norm_router(x_RH, x_RH, norm_weight_H, 1e-6, gate_EH, 8, True, None)
            normed_RH, _, ids_RK, _ = routed
            if wait:
                torch.cuda.synchronize()
            outputs.append(hopper.grouped_expert_ffn(normed_RH, ids_RK, None, *weights, 32))
            del routed, normed_RH, ids_RK  # the next call's may lie there
        return outputs

    for mine, theirs in zip(run(wait=False), run(wait=True), strict=True):
        assert torch.equal(mine, theirs)


def test_a_row_gets_the_same_bits_however_many_blocks_stream_its_experts() -> None:
    """Alone it gets all of them."""
    x_RH = torch.randn(4, 512, device="cuda").to(BF16)
    ids_RK = torch.randint(-1, 9, (4, 8), dtype=torch.int32, device="cuda")
    weights_RK = torch.rand(4, 8, device="cuda")
    weights = [w.cuda() for w in scattered(1, 1, 9, hidden=512).weights()]
    together_RH = hopper.streaming_expert_ffn(x_RH, ids_RK, weights_RK, *weights)
    for row in range(4):
        one = slice(row, row + 1)
        alone_RH = hopper.streaming_expert_ffn(x_RH[one], ids_RK[one], weights_RK[one], *weights)
        assert torch.equal(alone_RH, together_RH[one])


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_a_sequence_is_attended_to_with_the_same_bits_whoever_is_beside_it(launch: Launch) -> None:
    from moe_engine.kernels.launch import arrival_counters

    contexts = [700, 1, 33, 4500, 0, 16]
    decode = Decode.random(contexts, 8, 2)
    qkv_SX = torch.randn(len(contexts), decode.width, device="cuda").to(BF16)
    cache = on_gpu(decode.case.cache)

    def run(rows: slice) -> torch.Tensor:
        arguments = decode.arguments(cache, rows)
        return decode_attention.decode_attention(launch, qkv_SX[rows], **arguments)

    together_SND = run(slice(None))
    assert not together_SND[4].any()
    for row in range(len(contexts)):
        assert torch.equal(run(slice(row, row + 1)), together_SND[row : row + 1])
    assert not arrival_counters(qkv_SX.device).any()


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize("num_parts", [0, 3])
def test_decode_attention_caches_the_bits_of_the_operator_that_prepares(
    launch: Launch, num_parts: int
) -> None:
    """And nothing where there is no slot, or anywhere else."""
    decode = Decode.random([700, 1, 33, 0, 16, 97, 0, 5000, 640], 32, 4)
    shape = (num_parts, 9, decode.width) if num_parts else (9, decode.width)
    qkv = torch.randn(shape, device="cuda")
    qkv = qkv if num_parts else qkv.to(BF16)
    cache, expected = on_gpu(decode.case.cache), on_gpu(decode.case.cache)
    arguments = decode.arguments(cache)
    decode_attention.decode_attention(launch, qkv, **arguments)
    norm_rope_write(
        SplitSums(qkv, BF16) if num_parts else qkv,
        *arguments["norm_weights"],
        arguments["eps"],
        RopeTable(*arguments["cos_sin_PF"]),
        arguments["positions_R"],
        expected,
        arguments["slots_R"],
    )
    for ours, theirs in zip(cache, expected, strict=True):
        assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize("num_rows", [4, 20])
def test_decode_attention_waits_for_the_projection(num_rows: int, launch: Launch) -> None:
    """It begins before the projection has ended; its rows change from call to call."""
    decode = Decode.random([40 * row for row in range(num_rows)], 32, 4)
    weight_OX = (torch.randn(decode.width, 2048, device="cuda") / 45).to(BF16)
    project = hopper.linear if num_rows <= hopper.LINEAR_MAX_ROWS else hopper.split_linear
    x_NSX = torch.randn(20, num_rows, 2048, device="cuda").to(BF16)

    def run(wait: bool) -> list[torch.Tensor]:
        arguments = decode.arguments(on_gpu(decode.case.cache))
        outputs = []
        for x_SX in x_NSX:
            qkv = project(x_SX, weight_OX)
            if wait:
                torch.cuda.synchronize()
            outputs.append(decode_attention.decode_attention(launch, qkv, **arguments))
        return outputs

    for mine, theirs in zip(run(wait=False), run(wait=True), strict=True):
        assert torch.equal(mine, theirs)


def test_decode_attention_is_not_taken_where_it_does_not_fit() -> None:
    def choose(
        num_rows: int = 1,
        num_heads: int = 8,
        block_size: int = 16,
        head_dim: int = 128,
        dtype: torch.dtype = BF16,
        cache_dtype: torch.dtype = BF16,
    ) -> Launch | None:
        qkv_RX = torch.empty(num_rows, (num_heads + 2) * head_dim, dtype=dtype, device="cuda")
        shape = (4, block_size, 1, head_dim)
        k_cache_BLGD = torch.empty(shape, dtype=cache_dtype, device="cuda")
        return decode_attention.choose(qkv_RX, dtype, num_heads, k_cache_BLGD)

    first = 0
    *steps, (_, beyond) = DecodeChoices.default().launches
    for most, launch in steps:
        assert choose(first + 1) == choose(int(most)) == launch
        first = int(most)
    assert choose(first + 1) is beyond is None
    assert choose(num_heads=16) is not None
    assert choose(num_heads=17) is None
    assert choose(block_size=8) is None
    assert choose(head_dim=64) is None
    assert choose(dtype=torch.float16, cache_dtype=torch.float16) is None
    assert choose(cache_dtype=torch.float8_e4m3fn) is None


def test_norm_and_router_are_not_one_launch_where_they_do_not_fit() -> None:
    def takes(
        num_rows: int = 1,
        hidden: int = 256,
        num_experts: int = 32,
        top_k: int = 8,
        dtype: torch.dtype = BF16,
    ) -> bool:
        residual_RH = torch.empty(num_rows, hidden, dtype=dtype, device="cuda")
        gate_EH = torch.empty(num_experts, hidden, dtype=dtype, device="cuda")
        norm_weight_H = torch.empty(hidden, dtype=dtype, device="cuda")
        return hopper.takes_norm_router(residual_RH, residual_RH, norm_weight_H, gate_EH, top_k)

    assert takes(0)
    assert takes(64)
    assert not takes(65)
    assert not takes(dtype=torch.float16)
    assert takes(hidden=4096)
    assert not takes(hidden=4096 + 256)
    assert not takes(hidden=256 + 128)
    assert takes(num_experts=256)
    assert not takes(num_experts=264)
    assert not takes(num_experts=36)
    assert takes(hidden=4096, num_experts=128)
    assert not takes(hidden=4096, num_experts=256)  # no room for the gate
    assert takes(top_k=32)
    assert not takes(num_experts=64, top_k=33)
    assert not takes(num_experts=8, top_k=9)

    wide = torch.empty(32, 512, dtype=BF16, device="cuda")
    rows, gate_EH = wide[:, :256], torch.empty(32, 256, dtype=BF16, device="cuda")
    four, norm_weight_H = gate_EH[:4], gate_EH[0]
    assert hopper.takes_norm_router(rows[:4], four, norm_weight_H, gate_EH, 8)
    assert not hopper.takes_norm_router(four, rows[:4], norm_weight_H, gate_EH, 8)
    assert not hopper.takes_norm_router(four, four, norm_weight_H, rows, 8)


def test_a_router_that_the_kernel_has_no_room_for_is_refused() -> None:
    x_RH = torch.zeros(1, 256, dtype=BF16, device="cuda")
    gate_EH = torch.zeros(36, 256, dtype=BF16, device="cuda")
    with pytest.raises(ValueError, match="8 of 36 experts of width 256 does not fit the kernel"):
        hopper.norm_router(x_RH, x_RH, x_RH[0], 1e-6, gate_EH, 8, True, None)


def test_a_linear_layer_is_not_split_where_that_is_not_best_or_does_not_fit() -> None:
    def takes(
        num_rows: int = 32,
        in_features: int = 1024,
        out_features: int = 64,
        padding: int = 0,
        first: int = 0,
        dtype: torch.dtype = BF16,
    ) -> bool:
        wide = torch.empty(num_rows, first + in_features + padding, dtype=dtype, device="cuda")
        weight_OX = torch.empty(out_features, in_features, dtype=dtype, device="cuda")
        return hopper.takes_split_linear(wide[:, first : first + in_features], weight_OX)

    assert takes(17)
    assert takes(64)
    for num_rows in (0, 16, 65):
        assert not takes(num_rows)
    assert not takes(dtype=torch.float16)
    assert not takes(in_features=1024 + 256)
    assert not takes(out_features=60)
    # Five parts: so many rows that adding them up takes longer than splitting saves.
    assert takes(51, in_features=5 * 512)
    assert not takes(52, in_features=5 * 512)
    # As many columns as one round of blocks covers, and more.
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert takes(in_features=512, out_features=160 * num_sms)
    assert not takes(in_features=512, out_features=160 * num_sms + 8)
    # Rows that begin at multiples of 16 bytes, and others.
    assert takes(padding=8)
    assert takes(first=8)
    assert not takes(padding=4)
    assert not takes(first=4, padding=4)

    x_RX = torch.empty(32, 512, dtype=BF16, device="cuda")
    weight_OX = torch.empty(64, 1024, dtype=BF16, device="cuda")
    assert not hopper.takes_split_linear(x_RX, weight_OX[:, :512])


@pytest.mark.parametrize(
    ("num_rows", "in_features", "out_features"), [(65, 512, 64), (32, 768, 64), (32, 512, 60)]
)
def test_a_layer_that_the_split_kernel_has_no_room_for_is_refused(
    num_rows: int, in_features: int, out_features: int
) -> None:
    x_RX = torch.zeros(num_rows, in_features, dtype=BF16, device="cuda")
    weight_OX = torch.zeros(out_features, in_features, dtype=BF16, device="cuda")
    with pytest.raises(ValueError, match="does not fit the split kernel"):
        hopper.split_linear(x_RX, weight_OX)


@pytest.mark.parametrize("block_warps", [0, 6])
def test_what_decode_attention_cannot_do_is_refused(block_warps: int) -> None:
    decode = Decode.random([5], 34, 2)
    qkv_SX = torch.randn(1, decode.width, device="cuda").to(BF16)
    arguments = decode.arguments(on_gpu(decode.case.cache))
    with pytest.raises(ValueError, match="34 query heads to 2 KV"):
        decode_attention.decode_attention(Launch(block_warps, 1, 1), qkv_SX, **arguments)


def test_a_row_of_a_linear_layer_gets_the_same_bits_in_any_batch_of_up_to_8_and_to_16() -> None:
    x_RX = torch.randn(16, 1024, device="cuda").to(BF16)
    weight_OX = torch.randn(2560, 1024, device="cuda").to(BF16)
    for most in (8, 16):
        together = hopper.linear(x_RX[:most], weight_OX)
        for first, last in ((0, most - 7), (most - 7, most), (0, most // 2 + 1)):
            assert torch.equal(hopper.linear(x_RX[first:last], weight_OX), together[first:last])


def test_the_widest_linear_layer_is_taken_and_a_wider_one_left_to_the_library() -> None:
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    widest = 64 * num_sms
    run_linear(16, 256, widest)
    for out_features, in_features in ((widest + 1, 256), (8, 264)):
        weight_OX = torch.randn(out_features, in_features, device="cuda").to(BF16)
        x_RX = torch.randn(2, in_features, device="cuda").to(BF16)
        assert not hopper.takes_linear(x_RX, weight_OX)
        with pytest.raises(ValueError, match="does not fit the streaming kernel"):
            hopper.linear(x_RX, weight_OX)


def test_more_rows_than_the_linear_kernel_has_room_for_are_refused() -> None:
    x_RX = torch.randn(17, 256, device="cuda").to(BF16)
    weight_OX = torch.randn(8, 256, device="cuda").to(BF16)
    assert not hopper.takes_linear(x_RX, weight_OX)
    with pytest.raises(ValueError, match="17 tokens"):
        hopper.linear(x_RX, weight_OX)


@pytest.mark.parametrize(
    ("num_experts", "tile", "message"), [(1025, 16, "the limit is 1024"), (4, 48, "is 48")]
)
def test_what_the_grouped_kernel_cannot_do_is_refused(
    num_experts: int, tile: int, message: str
) -> None:
    case = scattered(2, 2, num_experts, hidden=64, intermediate=64)
    offsets_E1, pairs_P = reference.group_by_expert(case.ids_RK, num_experts)
    groups = offsets_E1.cuda(), pairs_P.cuda()
    weights = [w.cuda() for w in case.weights()]
    x_RH = torch.randn(2, 64, device="cuda").to(BF16)
    with pytest.raises(ValueError, match=message):
        hopper.grouped_expert_ffn(x_RH, case.ids_RK.cuda(), groups, *weights, tile)


@pytest.mark.parametrize(
    ("num_pairs", "num_experts", "tile"),
    [(1025, 4, 16), (1024, 257, 16), (257, 1024, 16), (8, 4, 128)],
)
def test_what_the_grouped_kernel_cannot_sort_is_refused(
    num_pairs: int, num_experts: int, tile: int
) -> None:
    weights = [w.cuda() for w in scattered(1, 1, num_experts, hidden=64, intermediate=64).weights()]
    x_RH = torch.randn(num_pairs, 64, device="cuda").to(BF16)
    ids_RK = torch.zeros(num_pairs, 1, dtype=torch.int32, device="cuda")
    assert not hopper.sorts_pairs(ids_RK, num_experts, tile)
    assert hopper.sorts_pairs(ids_RK[:256], num_experts, min(tile, 64))
    with pytest.raises(ValueError, match="must be sorted before"):
        hopper.grouped_expert_ffn(x_RH, ids_RK, None, *weights, tile)


def test_sizes_that_the_streaming_kernel_has_no_room_for_are_refused() -> None:
    weights = [w.cuda() for w in scattered(1, 1, 2, hidden=64, intermediate=2112).weights()]
    x_RH = torch.randn(1, 64, device="cuda").to(BF16)
    ids_RK = torch.zeros(1, 2, dtype=torch.int32, device="cuda")
    assert not hopper.takes_streaming_experts(2, weights[1], 1)
    with pytest.raises(ValueError, match="do not fit the streaming kernel"):
        hopper.streaming_expert_ffn(x_RH, ids_RK, torch.ones(1, 2, device="cuda"), *weights)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_rows_that_hopper_cannot_copy_go_elsewhere(num_rows: int) -> None:
    """Rows that do not begin at multiples of 16 bytes, sizes that are no multiples of 64."""
    wide = torch.randn(num_rows, 132, device="cuda").to(BF16)
    gate_up_EJH, down_EHI = (w.cuda() for w in scattered(1, 1, 4).weights())
    ids_RK = torch.zeros(num_rows, 2, dtype=torch.int32, device="cuda")

    def choose(x_RH: torch.Tensor, gate_up_EJH: torch.Tensor) -> str:
        return moe.choose_expert_ffn(x_RH, ids_RK, gate_up_EJH, down_EHI, ids_RK.numel())

    aligned = torch.randn(num_rows, 128, device="cuda").to(BF16)
    assert choose(aligned, gate_up_EJH) != "triton"
    assert choose(wide[:, 4:], gate_up_EJH) == "triton"
    assert choose(aligned.half(), gate_up_EJH.half()) == "triton"
    assert choose(wide[:, :96].contiguous(), gate_up_EJH[:, :, :96]) == "triton"
