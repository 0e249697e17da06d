"""The router kernels against float64 logits.

Legend: T tokens, E experts, H hidden size, K experts per token.
"""

from __future__ import annotations

import pytest
import torch

from moe_engine.ops.moe import route
from moe_engine.ops.reference import moe as reference
from tests.kernels.triton_device import DEVICE, MATMUL_DTYPES, needs_gpu, needs_triton

# (T, H, E, K): nothing, one, the widest choice, one expert, sizes that fit no tile.
SHAPES = [
    (0, 64, 8, 2),
    (1, 64, 8, 8),
    (5, 100, 100, 5),
    (16, 64, 512, 32),
    (17, 3, 1, 1),
    (35, 300, 60, 4),
]
# A rounding in float32 per thousand or so additions.
LOGIT_TOLERANCE = 1e-4


@pytest.fixture(params=["few tokens", "many tokens"])
def either_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with each of the two kernels, whatever the number of tokens."""
    from moe_engine.kernels import router

    largest = router.COUNTERS_PER_STREAM * router.SPLIT_BLOCK_T
    limit = largest if request.param == "few tokens" else 0
    monkeypatch.setattr(router, "SPLIT_MAX_TOKENS", limit)
    return str(request.param)


def inputs(
    num_tokens: int, hidden: int, num_experts: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    x_TH = torch.randn(num_tokens, hidden, device=DEVICE)
    gate_EH = torch.randn(num_experts, hidden, device=DEVICE) / hidden**0.5
    return x_TH.to(dtype), gate_EH.to(dtype)


def run(
    x_TH: torch.Tensor,
    gate_EH: torch.Tensor,
    top_k: int,
    normalize: bool = True,
    num_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from moe_engine.kernels import router

    num_tokens_1 = None
    if num_tokens is not None:
        num_tokens_1 = torch.tensor([num_tokens], dtype=torch.int32, device=x_TH.device)
    return router.route(x_TH, gate_EH, top_k, normalize, num_tokens_1)


def check(
    x_TH: torch.Tensor,
    gate_EH: torch.Tensor,
    normalize: bool,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> None:
    """Any order that float32 rounding allows is right; weights follow the ids chosen."""
    assert ids_TK.dtype == torch.int32
    assert weights_TK.dtype == torch.float32
    top_k = ids_TK.shape[1]
    logits_TE = x_TH.double() @ gate_EH.double().t()
    ids_TK = ids_TK.long()
    assert ((ids_TK >= 0) & (ids_TK < gate_EH.shape[0])).all()
    if top_k > 1:
        assert (ids_TK.sort(dim=1).values.diff(dim=1) > 0).all(), "an expert was chosen twice"
    chosen_TK = logits_TE.gather(1, ids_TK)
    best_TK = logits_TE.topk(top_k, dim=1).values
    torch.testing.assert_close(chosen_TK, best_TK, rtol=0, atol=LOGIT_TOLERANCE)
    expected_TK = logits_TE.softmax(dim=1).gather(1, ids_TK)
    if normalize:
        expected_TK = expected_TK / expected_TK.sum(dim=1, keepdim=True)
    torch.testing.assert_close(weights_TK.double(), expected_TK, rtol=1e-3, atol=1e-6)


@needs_triton
@pytest.mark.usefixtures("poisoned", "either_kernel")
@pytest.mark.parametrize("dtype", MATMUL_DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_experts_and_their_probabilities(
    shape: tuple[int, int, int, int], normalize: bool, dtype: torch.dtype
) -> None:
    num_tokens, hidden, num_experts, top_k = shape
    x_TH, gate_EH = inputs(num_tokens, hidden, num_experts, dtype)
    check(x_TH, gate_EH, normalize, *run(x_TH, gate_EH, top_k, normalize))


@needs_triton
@pytest.mark.usefixtures("poisoned", "either_kernel")
def test_equal_logits_go_to_the_lower_id() -> None:
    gate_EH = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 3.0, 0.0, -0.0], device=DEVICE)[:, None]
    gate_EH = gate_EH.repeat(1, 16)
    x_TH = torch.tensor([1.0, 0.0, -1.0], device=DEVICE)[:, None].repeat(1, 16)
    ids_TK, _ = run(x_TH, gate_EH, 8)
    assert ids_TK.tolist() == [
        [1, 3, 5, 2, 4, 0, 6, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [6, 7, 0, 2, 4, 1, 3, 5],
    ]


@needs_triton
@pytest.mark.usefixtures("poisoned", "either_kernel")
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 19, 37])
def test_padding_rows_get_no_expert_whatever_they_hold(num_tokens: int) -> None:
    x_TH, gate_EH = inputs(37, 64, 20, torch.float32)
    x_TH[num_tokens:] = float("nan")
    ids_TK, weights_TK = run(x_TH, gate_EH, 3, num_tokens=num_tokens)
    check(x_TH[:num_tokens], gate_EH, True, ids_TK[:num_tokens], weights_TK[:num_tokens])
    assert (ids_TK[num_tokens:] == -1).all()
    assert (weights_TK[num_tokens:] == 0).all()


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.usefixtures("poisoned", "either_kernel")
@pytest.mark.parametrize("normalize", [True, False])
def test_a_nan_logit_is_chosen_last_and_stays_in_its_row(normalize: bool) -> None:
    x_TH, gate_EH = inputs(20, 64, 10, torch.float32)
    x_TH[3, 5] = float("nan")
    x_TH[4] = float("inf")
    ids_TK, _ = run(x_TH, gate_EH, 10, normalize)
    assert (ids_TK.sort(dim=1).values == torch.arange(10, device=DEVICE)).all()
    assert ids_TK[3].tolist() == list(range(10))

    x_TH, gate_EH = inputs(20, 64, 10, torch.float32)
    gate_EH[4, 0] = float("nan")
    ids_TK, weights_TK = run(x_TH, gate_EH, 9, normalize)
    assert (ids_TK != 4).all()
    assert (weights_TK > 0).all()


@needs_triton
@pytest.mark.usefixtures("either_kernel")
def test_a_slice_of_wider_rows_is_read_in_place() -> None:
    wide, gate_EH = inputs(9, 128, 12, torch.float32)
    x_TH, gate_EH = wide[:, 32:96], gate_EH[:, :64].contiguous()
    check(x_TH, gate_EH, True, *run(x_TH, gate_EH, 4))


@needs_triton
def test_repeated_calls_find_the_counters_as_they_were() -> None:
    from moe_engine.kernels.launch import arrival_counters

    x_TH, gate_EH = inputs(40, 128, 70, torch.float32)
    first = run(x_TH, gate_EH, 6)
    for _ in range(3):
        again = run(x_TH, gate_EH, 6)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not arrival_counters(x_TH.device).any()


@needs_triton
@pytest.mark.parametrize("num_rows", [1, 512, 513, 3000, 8192])
def test_the_tile_of_many_tokens_fits_its_experts(num_rows: int) -> None:
    from moe_engine.kernels import router

    for padded_experts in (16, 128, 256, 512):
        block_t = router._whole_block_t(num_rows, padded_experts)
        assert block_t >= 16
        assert block_t * padded_experts <= router.MAX_LOGITS


@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 64, 250, 512, 513, 2048, 3001, 8192])
def test_real_sizes(num_tokens: int, dtype: torch.dtype) -> None:
    x_TH, gate_EH = inputs(num_tokens, 2048, 128, dtype)
    check(x_TH, gate_EH, True, *run(x_TH, gate_EH, 8))


@needs_gpu
@pytest.mark.parametrize("hidden", [2048, 4096])
def test_a_token_gets_the_same_bits_in_any_batch(hidden: int) -> None:
    """Across both kernels and all their tiles."""
    x_TH, gate_EH = inputs(8192, hidden, 128, torch.bfloat16)
    ids_TK, weights_TK = run(x_TH, gate_EH, 8)
    for rows in (slice(5, 6), slice(0, 3), slice(100, 164), slice(40, 552), slice(3, 1003)):
        for first, last in ((rows.start, rows.stop), (rows.start, rows.start + 4001)):
            some_ids, some_weights = run(x_TH[first:last], gate_EH, 8)
            assert torch.equal(some_ids, ids_TK[first:last])
            assert torch.equal(some_weights, weights_TK[first:last])


@needs_gpu
@pytest.mark.parametrize("num_rows", [1, 64, 1024])
def test_a_graph_replays_with_other_tokens(num_rows: int) -> None:
    x_TH, gate_EH = inputs(num_rows, 2048, 128, torch.bfloat16)
    num_tokens_1 = torch.full((1,), num_rows, dtype=torch.int32, device=DEVICE)
    route(x_TH, gate_EH, 8, True, num_tokens_1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids_TK, weights_TK = route(x_TH, gate_EH, 8, True, num_tokens_1)
    for num_tokens in (num_rows, (num_rows + 1) // 2, 0, num_rows):
        x_TH.copy_(torch.randn(num_rows, 2048))
        num_tokens_1.fill_(num_tokens)
        graph.replay()
        real = slice(0, num_tokens)
        check(x_TH[real], gate_EH, True, ids_TK[real], weights_TK[real])
        assert (ids_TK[num_tokens:] == -1).all()


@needs_gpu
def test_row_offsets_pass_two_to_the_31() -> None:
    row_stride = 2**30
    storage = torch.empty(2 * row_stride + 64, dtype=torch.bfloat16, device=DEVICE)
    x_TH = storage.as_strided((3, 64), (row_stride, 1))
    x_TH.copy_(torch.randn(3, 64))
    _, gate_EH = inputs(1, 64, 16, torch.bfloat16)
    check(x_TH, gate_EH, True, *run(x_TH, gate_EH, 4))


@needs_gpu
def test_cuda_tensors_take_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_engine.kernels import router

    calls: list[int] = []
    monkeypatch.setattr(router, "route", lambda x_TH, *_: calls.append(len(x_TH)) or (x_TH, x_TH))
    route(*inputs(3, 64, 8, torch.bfloat16), 2, True)
    assert calls == [3]


def test_cpu_tensors_take_the_reference() -> None:
    x_TH, gate_EH = torch.randn(5, 16), torch.randn(8, 16)
    ours = route(x_TH, gate_EH, 2, True)
    expected = reference.route(x_TH, gate_EH, 2, True)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
