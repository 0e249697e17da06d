"""Sampling kernels against float64 probabilities, and against themselves in other company.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch

from moe_engine.ops.sampling import greedy_tokens
from tests.kernels.sampling_cases import (
    ALMOST_ONE,
    INF,
    make_params,
    middles,
    probabilities,
    random_params,
    right_tokens,
)
from tests.kernels.triton_device import DEVICE, needs_gpu, needs_triton

NAN = math.nan
# What the kernels are built for, and less, for small vocabularies: several segments and tiles of a
# row; lists that are too short for most cuts, and for all.
SIZES = {
    "real": {},
    "small": {"SEGMENT": 512, "BLOCK": 256, "CAPACITY": 64},
    "short lists": {"SEGMENT": 256, "BLOCK": 256, "CAPACITY": 4, "NUM_NARROWINGS": 1},
    "no lists": {"SEGMENT": 512, "BLOCK": 512, "CAPACITY": 1},
}


def run(logits_BV: torch.Tensor, params_5B: torch.Tensor, sizes: str = "small") -> list[int]:
    from moe_engine.kernels import sampling

    with pytest.MonkeyPatch.context() as patch:
        for name, value in SIZES[sizes].items():
            patch.setattr(sampling, name, value)
        tokens_B = sampling.sample_tokens(logits_BV.to(DEVICE), params_5B.to(DEVICE))
    assert tokens_B.dtype == torch.int64
    return tokens_B.tolist()


def random_logits(num_rows: int, vocab_size: int, spread: float, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def assert_right(tokens: list[int], logits_BV: torch.Tensor, params_5B: torch.Tensor) -> None:
    """Every token is right, and for nearly all rows only one would be."""
    num_clear = 0
    for row, token in enumerate(tokens):
        params = params_5B[:, row].tolist()
        right = right_tokens(logits_BV[row], params)
        assert token in right, f"row {row}: {token} is not in {right}, {params}"
        num_clear += len(right) == 1
    assert num_clear >= 0.8 * len(tokens)


def kept_by(logits: list[float] | torch.Tensor, sizes: str = "small", **values: float) -> list[int]:
    """The tokens that can be drawn, if there are few of about the same probability."""
    uniforms = [0.0, 0.28, 0.45, 0.7, ALMOST_ONE]
    logits_V = torch.as_tensor(logits)
    params = make_params(len(uniforms), uniform=uniforms, **values)
    return sorted(set(run(logits_V.expand(len(uniforms), -1), params, sizes)))


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "spread", "dtype", "sizes"),
    [
        (0, 5, 1.0, F32, "small"),
        (4, 1, 1.0, F32, "small"),
        (6, 2, 1.0, BF16, "small"),
        (8, 256, 3.0, F16, "small"),
        (9, 1003, 3.0, F32, "small"),
        (7, 1003, 0.3, BF16, "small"),
        (6, 700, 2.0, BF16, "short lists"),
        (6, 999, 1.0, F32, "no lists"),
        (3, 5000, 1.0, BF16, "real"),
    ],
)
def test_rows_of_every_kind(
    num_rows: int, vocab_size: int, spread: float, dtype: torch.dtype, sizes: str
) -> None:
    logits_BV = random_logits(num_rows, vocab_size, spread, seed=vocab_size).to(dtype)
    params_5B = random_params(num_rows, vocab_size, seed=vocab_size)
    assert_right(run(logits_BV, params_5B, sizes), logits_BV, params_5B)


@needs_triton
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.5, "top_k": 7},
        {"temperature": 1.5, "top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"temperature": 2.0, "top_k": 30, "top_p": 0.7, "min_p": 0.02},
    ],
)
def test_every_possible_token_has_its_place_in_the_distribution(values: dict[str, float]) -> None:
    logits_V = random_logits(1, 300, 2.5, seed=len(values))[0]
    params = make_params(1, **values)[:, 0].tolist()
    tokens, uniforms = middles(probabilities(logits_V, params))
    assert len(tokens) > 5
    some = slice(None, None, len(tokens) // 4)
    tokens, uniforms = tokens[some], uniforms[some]
    params_5B = make_params(len(tokens), uniform=uniforms, **values)
    assert run(logits_V.expand(len(tokens), -1), params_5B) == tokens


@needs_triton
def test_a_row_gets_the_same_token_in_any_company_and_however_it_is_split() -> None:
    logits_BV = random_logits(5, 600, 1.5, seed=7).bfloat16()
    params_5B = random_params(5, 600, seed=8)
    together = run(logits_BV, params_5B)
    for sizes in ("no lists", "short lists"):
        assert run(logits_BV, params_5B, sizes) == together
    order = torch.randperm(5)[:3]
    # The same numbers in another type.
    some = run(logits_BV[order].float(), params_5B[:, order])
    assert some == [together[row] for row in order.tolist()]


# Filters.


@needs_triton
@pytest.mark.parametrize(
    ("top_k", "kept", "sizes"),
    [
        (1, [1], "small"),
        (2, [1, 2, 4], "small"),
        (3, [1, 2, 4], "no lists"),
        (4, [0, 1, 2, 4], "small"),
        (5, [0, 1, 2, 3, 4], "small"),
    ],
)
def test_top_k_keeps_ties_with_the_last_one(top_k: int, kept: list[int], sizes: str) -> None:
    logits = [1.0, 1.1, 1.05, 0.9, 1.05]
    assert kept_by(logits, sizes, top_k=top_k, temperature=2.0) == kept


@needs_triton
@pytest.mark.parametrize(
    ("top_p", "kept", "sizes"),
    [
        (0.25, [0, 1], "small"),
        (0.25, [0, 1], "no lists"),
        (0.26, [0, 1, 2], "small"),
        (1e-9, [0], "no lists"),
    ],
)
def test_top_p_keeps_the_lowest_ids_among_equals(top_p: float, kept: list[int], sizes: str) -> None:
    assert kept_by([0.0] * 8, sizes, top_p=top_p) == kept


@needs_triton
def test_top_p_goes_on_to_ties_after_the_most_likely() -> None:
    # 0.5 for token 5, and 0.125 for each of four others, of which two are needed.
    logits = [math.log(0.125)] * 4 + [-INF, math.log(0.5)]
    assert kept_by(logits, top_p=0.7) == [0, 1, 5]


@needs_triton
@pytest.mark.parametrize(
    ("min_p", "kept"), [(1.0, [0]), (0.7, [0, 1]), (0.45, [0, 1, 2]), (1e-6, [0, 1, 2, 3])]
)
def test_min_p_compares_with_the_most_likely(min_p: float, kept: list[int]) -> None:
    assert kept_by(torch.tensor([0.3, 0.25, 0.2, 0.1]).log(), min_p=min_p) == kept


@needs_triton
@pytest.mark.parametrize("sizes", ["small", "no lists"])
@pytest.mark.parametrize(
    ("values", "kept"),
    [
        # min_p leaves 0.4, 0.3 and 0.2; of these top_k leaves 4/7 and 3/7; top_p 0.55 leaves 4/7.
        ({"min_p": 0.4, "top_k": 2, "top_p": 0.55}, [0]),
        ({"min_p": 0.4, "top_k": 2, "top_p": 0.6}, [0, 1]),
        # What min_p leaves is less than top_k allows.
        ({"min_p": 0.7, "top_k": 3, "top_p": 0.99}, [0, 1]),
    ],
)
def test_filters_act_one_after_the_other(
    values: dict[str, float], kept: list[int], sizes: str
) -> None:
    logits_V = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    uniforms = [0.0, ALMOST_ONE]
    params_5B = make_params(2, uniform=uniforms, **values)
    assert run(logits_V.expand(2, -1), params_5B, sizes) == [kept[0], kept[-1]]


@needs_triton
@pytest.mark.parametrize("sizes", ["small", "no lists"])
def test_top_p_may_cut_through_ties_far_above_the_cut_of_top_k(sizes: str) -> None:
    # top_k keeps all, because the last one ties; half of the four likely ones reach 0.3.
    logits_V = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.1, 0.1]).log()
    params_5B = make_params(2, top_k=5, top_p=0.3, uniform=[0.0, ALMOST_ONE])
    assert run(logits_V.expand(2, -1), params_5B, sizes) == [0, 1]


@needs_triton
def test_uniform_reaches_both_ends() -> None:
    logits_BV = torch.tensor([[-INF, 0.0, 1.0, 0.5, -INF]]).expand(2, 5)
    assert run(logits_BV, make_params(2, uniform=[0.0, ALMOST_ONE])) == [1, 3]
    uniforms = [0.5 - 1e-9, 0.5, 0.5 + 1e-9]
    assert run(torch.zeros(3, 2), make_params(3, uniform=uniforms)) == [0, 1, 1]


# Broken and extreme logits.


@needs_triton
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "token"),
    [
        ([NAN, 1.0, NAN], 1),
        ([NAN, NAN, NAN], 0),
        ([-INF, -INF, -INF], 0),
        ([0.0, INF, 0.0], 1),
        ([3e38, -3e38, 1.0], 0),
        ([-3e38, -INF, -INF], 0),
    ],
)
def test_broken_logits(logits: list[float], token: int, temperature: float) -> None:
    params = make_params(
        5,
        temperature=temperature,
        top_k=[0, 2, 0, 1, 0],
        top_p=[1.0, 0.9, 0.5, 1.0, 1.0],
        min_p=[0.0, 0.1, 0.0, 0.0, 1e-300],
        uniform=[0.0, 0.5, ALMOST_ONE, 0.5, ALMOST_ONE],
    )
    assert run(torch.tensor([logits] * 5), params) == [token] * 5


@needs_triton
def test_positive_and_negative_zero_are_equal() -> None:
    logits_BV = torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, -1.0]])
    params_5B = make_params(2, top_k=[1, 0], top_p=[1.0, 0.1], uniform=ALMOST_ONE)
    assert run(logits_BV, params_5B) == [1, 0]


@needs_triton
@pytest.mark.parametrize("temperature", [1e-5, 2.0])
def test_extreme_temperatures(temperature: float) -> None:
    logits_BV = random_logits(6, 50, 3.0, seed=3)
    params_5B = make_params(6, temperature=temperature, uniform=torch.rand(6).double())
    assert_right(run(logits_BV, params_5B), logits_BV, params_5B)


# Memory.


@needs_triton
def test_rows_and_parameters_may_be_parts_of_wider_tensors() -> None:
    wide = random_logits(4, 400, 3.0, seed=1)
    params_5W = random_params(9, 300, seed=2)
    logits_BV, params_5B = wide.to(DEVICE)[:, 50:350], params_5W.to(DEVICE)[:, 3:7]
    assert_right(run(logits_BV, params_5B), wide[:, 50:350], params_5W[:, 3:7])


@needs_triton
def test_rows_beyond_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_engine.kernels import sampling

    logits_BV, params_5B = random_logits(5, 40, 2.0, seed=4), random_params(5, 40, seed=5)
    expected = run(logits_BV, params_5B)
    monkeypatch.setattr(sampling, "MAX_ROWS", 2)
    assert run(logits_BV, params_5B) == expected


@needs_triton
def test_counters_are_left_as_they_were() -> None:
    from moe_engine.kernels.launch import arrival_counters

    run(random_logits(4, 900, 2.0, seed=6), random_params(4, 900, seed=6))
    assert not arrival_counters(torch.empty(0, device=DEVICE).device).any()


# Real sizes.

V = 151_936


@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("num_rows", [1, 17, 256])
def test_real_sizes(num_rows: int, spread: float, dtype: torch.dtype) -> None:
    logits_BV = random_logits(num_rows, V, spread, seed=num_rows).to(DEVICE, dtype)
    params_5B = random_params(num_rows, V, seed=num_rows)
    tokens = run(logits_BV, params_5B, "real")
    for row in range(0, num_rows, 8):
        right = right_tokens(logits_BV[row], params_5B[:, row].tolist())
        assert tokens[row] in right, (row, params_5B[:, row].tolist())
    greedy = params_5B[0] == 0.0
    assert torch.equal(torch.tensor(tokens)[greedy], greedy_tokens(logits_BV).cpu()[greedy])


@needs_gpu
@pytest.mark.parametrize("values", [{"top_p": 0.3}, {"top_k": 5000, "top_p": 0.9}, {"top_k": 3}])
def test_many_equal_logits(values: dict[str, float]) -> None:
    """More than a list holds: the whole row, or every tenth logit, is equal to the largest."""
    logits_BV = torch.zeros(2, V, device=DEVICE, dtype=torch.bfloat16)
    logits_BV[1] -= 1.0
    logits_BV[1, ::10] = 0.0
    uniforms = torch.rand(40, dtype=torch.float64)
    for row in range(2):
        params_5B = make_params(40, uniform=uniforms, **values)
        logits_40V = logits_BV[row].expand(40, V)
        tokens = run(logits_40V, params_5B, "real")
        for index, token in enumerate(tokens):
            assert token in right_tokens(logits_BV[row], params_5B[:, index].tolist())


@needs_gpu
def test_draws_follow_the_distribution() -> None:
    num_draws = 40_000
    logits_V = torch.tensor([2.0, 0.0, -1.0, 1.5, -INF, 0.7, -4.0])
    uniforms = torch.rand(num_draws, dtype=torch.float64)
    params_5B = make_params(num_draws, temperature=0.8, top_k=5, top_p=0.97, uniform=uniforms)
    tokens = run(logits_V.expand(num_draws, -1).contiguous(), params_5B, "real")
    probs_V = probabilities(logits_V, params_5B[:, 0].tolist())
    observed_V = torch.bincount(torch.tensor(tokens), minlength=7)
    possible = probs_V > 0
    assert possible.sum() == 4
    assert observed_V[~possible].sum() == 0
    expected_V = probs_V * num_draws
    chi_square = float(((observed_V - expected_V)[possible] ** 2 / expected_V[possible]).sum())
    assert chi_square < 21.1  # the 0.9999 quantile for 3 degrees of freedom


@needs_gpu
def test_a_graph_replays_with_other_logits_and_parameters() -> None:
    from moe_engine.ops.sampling import sample_tokens

    logits_BV = torch.zeros(5, V, device=DEVICE, dtype=torch.bfloat16)
    params_5B = make_params(5).to(DEVICE)
    sample_tokens(logits_BV, params_5B)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens_B = sample_tokens(logits_BV, params_5B)
    for seed in range(4):
        logits_BV.copy_(random_logits(5, V, 3.0, seed))
        params_5B.copy_(random_params(5, V, seed))
        graph.replay()
        replayed = tokens_B.tolist()
        assert replayed == sample_tokens(logits_BV, params_5B).tolist()
        assert_right(replayed, logits_BV, params_5B)


@needs_gpu
def test_row_offsets_pass_two_to_the_31() -> None:
    storage = torch.empty(2 * 2**30 + 3000, dtype=torch.bfloat16, device=DEVICE)
    logits_BV = storage.as_strided((3, 3000), (2**30, 1))
    logits_BV.copy_(random_logits(3, 3000, 3.0, seed=1))
    params_5B = make_params(3, top_k=50, uniform=[0.1, 0.5, 0.9])
    assert_right(run(logits_BV, params_5B, "real"), logits_BV, params_5B)
