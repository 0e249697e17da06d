"""The exchange's reference against all experts in one place, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_engine.ops.reference import exchange
from moe_engine.ops.reference.exchange import Tokens


def random_ranks(seed: int, counts: list[int], num_experts: int, top_k: int) -> list[Tokens]:
    torch.manual_seed(seed)
    ranks = []
    for count in counts:
        ids_TK = torch.rand(count, num_experts).topk(top_k).indices.int()
        ids_TK[torch.rand(count, top_k) < 0.2] = -1
        ranks.append(Tokens(torch.randn(count, 16), ids_TK, torch.rand(count, top_k)))
    return ranks


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 1 << 20)
)
def test_every_token_gets_the_sum_of_its_experts(
    counts: list[int], num_local: int, seed: int
) -> None:
    num_experts, top_k = num_local * len(counts), min(3, num_local * len(counts))
    step_tokens = max(1, *counts)
    ranks = random_ranks(seed, counts, num_experts, top_k)
    factors_E = torch.randn(num_experts)
    sums = []
    for rank, arrivals in enumerate(exchange.dispatch(ranks, num_experts, step_tokens)):
        assert arrivals.x_RH.shape == (len(counts) * step_tokens, 16)
        local_E = factors_E[rank * num_local :][:num_local]
        factors_RK1 = local_E[arrivals.slots_RK.clamp(min=0)][..., None]
        # What nobody wants is never looked at.
        y_RKH = torch.where(
            arrivals.slots_RK[..., None] >= 0, factors_RK1 * arrivals.x_RH[:, None], torch.nan
        )
        sums.append(exchange.presum(y_RKH.flatten(0, 1), arrivals))
    outputs = exchange.combine(sums, ranks, num_experts, step_tokens)
    for tokens, out_TH in zip(ranks, outputs, strict=True):
        weights_TK = torch.where(tokens.ids_TK >= 0, tokens.weights_TK, 0).double()
        factors_TK = factors_E.double()[tokens.ids_TK.clamp(min=0)]
        expected_TH = (weights_TK * factors_TK).sum(dim=1, keepdim=True) * tokens.x_TH.double()
        torch.testing.assert_close(out_TH.double(), expected_TH, rtol=1e-5, atol=1e-5)


def test_the_example_of_dispatch() -> None:
    nothing = Tokens(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 2))
    one = Tokens(
        torch.ones(1, 4), torch.tensor([[0, 3]], dtype=torch.int32), torch.tensor([[0.25, 0.75]])
    )
    first, second = exchange.dispatch([nothing, one], num_experts=4, step_tokens=1)
    assert first.slots_RK.tolist() == [[-1, -1], [0, -1]]
    assert first.weights_RK.tolist() == [[0, 0], [0.25, 0]]
    assert second.slots_RK.tolist() == [[-1, -1], [-1, 1]]
    assert second.x_RH.tolist() == [[0] * 4, [1] * 4]


def test_rows_in_8_bits_keep_three_bits_of_each_element() -> None:
    x_TH = torch.randn(5, 256) * torch.logspace(-3, 3, 256)
    x_TH[1, :128] = 0
    x_TH[2, :2] = torch.tensor([448.0, 3.3])
    x_TH[2, 2:128] = 0
    kept_TH = exchange.through_fp8(x_TH)
    assert kept_TH[2, :2].tolist() == [448, 3.25]
    assert not kept_TH[1, :128].any()
    largest_TG1 = x_TH.unflatten(1, (2, 128)).abs().amax(dim=2, keepdim=True)
    # Half of the last of three bits, or of the smallest step of all, as e4m3 goes down to 2^-9.
    limits_TGE = torch.maximum(x_TH.unflatten(1, (2, 128)).abs() / 16, largest_TG1 / 448 / 1024)
    errors_TGE = (kept_TH - x_TH).abs().unflatten(1, (2, 128))
    assert (errors_TGE <= limits_TGE * 1.0001).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_once_a_rank_and_once_at_home(dtype: torch.dtype) -> None:
    x_TH = torch.zeros(1, 4, dtype=dtype)
    ids_TK = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    tokens = Tokens(x_TH, ids_TK, torch.tensor([[1.0, 1.0, 1.0]]))
    nothing = Tokens(x_TH[:0], ids_TK[:0], tokens.weights_TK[:0])
    tiny = torch.finfo(dtype).eps / 4
    sums = []
    for arrivals in exchange.dispatch([tokens, nothing], num_experts=4, step_tokens=1):
        y_PH = torch.tensor([1.0, tiny, tiny], dtype=dtype)[:, None].expand(3, 4).repeat(2, 1)
        sums.append(exchange.presum(y_PH, arrivals))
    # At rank 0 the tiny addend is lost to rounding, at home that of rank 1 is.
    assert sums[0][0].tolist() == [1.0] * 4
    assert sums[1][0].tolist() == [tiny] * 4
    out_TH, _ = exchange.combine(sums, [tokens, nothing], num_experts=4, step_tokens=1)
    assert out_TH.tolist() == [[1.0] * 4]
