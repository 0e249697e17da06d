"""Rows that draw from all their logits, which the first launch finishes.

Every token is held against float64 cumulative probabilities: its interval, made 1e-6 longer at both
ends, must hold the row's uniform number.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe_engine.ops.sampling import any_filter, greedy_tokens, sample_tokens
from tests.kernels.sampling_cases import ALMOST_ONE, INF, make_params, probabilities, random_params
from tests.kernels.triton_device import DEVICE, needs_gpu, needs_triton

NAN = math.nan
TOLERANCE = 1e-6
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PART = 2048  # of `kernels.sampling_start`, which needs Triton
# One logit, a part and its neighbours, two parts and their neighbours, several.
VOCAB_SIZES = [1, 2, 255, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 1, 5 * PART + 300]


def run(
    logits_BV: torch.Tensor, params_5B: torch.Tensor, may_filter: bool = False, **options: object
) -> list[int]:
    from moe_engine.kernels import sampling

    tokens_B = sampling.sample_tokens(
        logits_BV.to(DEVICE), params_5B.to(DEVICE), may_filter=may_filter, **options
    )
    assert tokens_B.dtype == torch.int64
    return tokens_B.tolist()


def random_logits(num_rows: int, vocab_size: int, spread: float) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size) * spread


def random_plain_params(num_rows: int, temperatures: list[float]) -> torch.Tensor:
    """Temperatures in turn; the first and the last uniform number are as far apart as can be."""
    uniform = torch.rand(num_rows, dtype=torch.float64)
    uniform[-1], uniform[0] = ALMOST_ONE, 0.0
    temperature = torch.tensor(temperatures, dtype=torch.float64).repeat(num_rows)[:num_rows]
    return make_params(num_rows, temperature=temperature, uniform=uniform)


def assert_drawn(tokens: list[int], logits_BV: torch.Tensor, params_5B: torch.Tensor) -> None:
    for row, token in enumerate(tokens):
        params = params_5B[:, row].tolist()
        probs_V = probabilities(logits_BV[row].cpu(), params)
        end = float(probs_V[: token + 1].sum())
        begin = end - float(probs_V[token])
        assert probs_V[token] > 0, f"row {row}: {token} is impossible"
        assert begin - TOLERANCE <= params[4] <= end + TOLERANCE, (row, token, begin, end, params)


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_every_token_is_where_the_distribution_has_it(vocab_size: int, dtype: torch.dtype) -> None:
    logits_BV = torch.cat([random_logits(4, vocab_size, spread) for spread in (0.1, 3.0)]).to(dtype)
    params_5B = random_plain_params(8, [1.0, 0.3, 2.0])
    assert_drawn(run(logits_BV, params_5B), logits_BV, params_5B)


@needs_triton
@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 100.0, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    """Whole numbers, so that the largest logits tie and others are far off at low temperatures."""
    logits_BV = random_logits(5, 2500, 2.0).round()
    params_5B = random_plain_params(5, [temperature])
    assert_drawn(run(logits_BV, params_5B), logits_BV, params_5B)


@needs_triton
def test_evenly_spread_numbers_draw_each_token_as_often_as_it_is_likely() -> None:
    num_draws, vocab_size = 200, PART + 76
    logits_V = random_logits(1, vocab_size, 1.0)[0]
    # A few tokens in either part that are likely enough to be counted.
    logits_V[[3, 500, PART - 1, PART, PART + 75]] = torch.tensor([6.0, 5.0, 7.0, 5.5, 6.5])
    uniform = (torch.arange(num_draws) + 0.5).double() / num_draws
    params_5B = make_params(num_draws, uniform=uniform)
    tokens = run(logits_V.expand(num_draws, -1), params_5B)
    assert tokens == sorted(tokens)
    expected_V = probabilities(logits_V, params_5B[:, 0].tolist()) * num_draws
    observed_V = torch.bincount(torch.tensor(tokens), minlength=vocab_size)
    assert (observed_V - expected_V).abs().max() <= 1.0 + 1e-3


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_parts", [3, 5, 6])
def test_a_program_of_several_parts_finds_the_same(
    monkeypatch: pytest.MonkeyPatch, num_parts: int
) -> None:
    """The last program of a row has fewer of them, one of which is not full."""
    from moe_engine.kernels import sampling

    logits_BV = random_logits(6, num_parts * PART - 100, 3.0)
    params_5B = random_plain_params(6, [1.0, 0.3, 2.0])
    expected = run(logits_BV, params_5B)
    assert_drawn(expected, logits_BV, params_5B)
    for num_programs in (2 * 6, 6, 1):
        monkeypatch.setattr(sampling, "NUM_PROGRAMS", num_programs)
        assert run(logits_BV, params_5B) == expected


def test_a_part_is_as_long_as_these_tests_say() -> None:
    sampling_start = pytest.importorskip("moe_engine.kernels.sampling_start")
    assert sampling_start.PART == PART


# What a row is beside.


@needs_triton
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_gets_the_same_token_alone_and_beside_any_others(dtype: torch.dtype) -> None:
    logits_BV = random_logits(6, 2300, 1.0).to(dtype)
    plain_5B = random_plain_params(6, [0.7, 1.0, 1.9])
    tokens = run(logits_BV, plain_5B)
    assert run(logits_BV, plain_5B, may_filter=True) == tokens
    assert [run(logits_BV[i : i + 1], plain_5B[:, i : i + 1])[0] for i in range(6)] == tokens
    assert run(logits_BV.float(), plain_5B) == tokens
    others_5B = make_params(
        6, temperature=[0.0, 1.0, 0.8, 1.5, 1.0, 1.0], top_k=[0, 5, 0, 0, 3, 0],
        top_p=[1.0, 1.0, 0.8, 1.0, 0.9, 1e-9], min_p=[0.0, 0.0, 0.0, 0.1, 0.0, 0.0],
    )  # fmt: skip
    params_5X = torch.stack([plain_5B, others_5B], dim=2).flatten(1)
    logits_XV = torch.stack([logits_BV, random_logits(6, 2300, 1.0).to(dtype)], dim=1).flatten(0, 1)
    assert run(logits_XV, params_5X, may_filter=True)[::2] == tokens


@needs_triton
def test_greedy_rows_among_drawn_ones() -> None:
    logits_BV = random_logits(6, 4500, 2.0).round()
    params_5B = random_plain_params(6, [0.0, 1.0])
    expected = greedy_tokens(logits_BV).tolist()
    for may_filter in (False, True):
        tokens = run(logits_BV, params_5B, may_filter)
        assert tokens[::2] == expected[::2]
        assert_drawn(tokens[1::2], logits_BV[1::2], params_5B[:, 1::2])


@needs_triton
def test_filters_of_greedy_rows_do_not_count() -> None:
    logits_BV = random_logits(3, 1500, 2.0)
    params_5B = make_params(3, temperature=0.0, top_k=2, top_p=0.5, min_p=0.1)
    assert run(logits_BV, params_5B) == greedy_tokens(logits_BV).tolist()


# Broken and extreme logits.


def sparse(places: dict[int, float], rest: float, vocab_size: int = 2200) -> torch.Tensor:
    logits_V = torch.full((vocab_size,), rest)
    logits_V[list(places)] = torch.tensor(list(places.values()))
    return logits_V


@needs_triton
@pytest.mark.parametrize("may_filter", [False, True])
@pytest.mark.parametrize(
    ("places", "rest", "first", "last"),
    [
        ({2199: 0.0}, -INF, 2199, 2199),
        ({2199: -3e38}, -INF, 2199, 2199),
        ({2047: 5.0, 2199: 5.0}, -INF, 2047, 2199),
        ({2199: 60.0}, 0.0, 2199, 2199),
        ({7: 1.0, 1030: 1.0, 2100: 1.0}, -INF, 7, 2100),
        ({5: NAN, 1500: 1.0}, NAN, 1500, 1500),
        ({1500: 1.0, 3: -INF}, NAN, 1500, 1500),
        ({1100: INF, 0: 3e38}, 0.0, 1100, 1100),
        ({1100: INF, 2150: INF}, -INF, 1100, 2150),
        ({1100: INF, 1101: INF}, NAN, 1100, 1101),
        ({0: -INF}, -INF, 0, 0),
        ({0: NAN}, -INF, 0, 0),
        ({0: NAN}, NAN, 0, 0),
    ],
)
def test_only_possible_tokens_at_both_ends(
    places: dict[int, float], rest: float, first: int, last: int, may_filter: bool
) -> None:
    logits_BV = sparse(places, rest).expand(2, -1)
    params_5B = make_params(2, uniform=[0.0, ALMOST_ONE])
    assert run(logits_BV, params_5B, may_filter) == [first, last]


@needs_triton
@pytest.mark.parametrize("values", [{"min_p": 0.5}, {"top_p": 0.99}, {"top_k": 2}])
def test_infinite_logits_tie_in_rows_that_filter(values: dict[str, float]) -> None:
    params_5B = make_params(2, uniform=[0.0, ALMOST_ONE], **values)
    assert run(torch.full((2, 3), INF), params_5B, may_filter=True) == [0, 2]


@needs_triton
def test_ties_share_the_interval_evenly() -> None:
    uniform = [0.0, 0.25 - 1e-9, 0.25, 0.5 - 1e-9, 0.5, 0.75, ALMOST_ONE]
    logits_V = sparse({10: 2.0, PART - 1: 2.0, PART: 2.0, PART + 151: 2.0}, -INF)
    tokens = run(logits_V.expand(7, -1), make_params(7, uniform=uniform))
    assert tokens == [10, 10, PART - 1, PART - 1, PART, PART + 151, PART + 151]


# Memory.


@needs_triton
@pytest.mark.parametrize("may_filter", [False, True])
def test_tokens_are_written_where_the_caller_wants_them(may_filter: bool) -> None:
    from moe_engine.kernels import sampling

    logits_BV, params_5B = random_logits(4, 300, 2.0), random_plain_params(4, [1.0])
    tokens_X = torch.full((8,), -5, dtype=torch.int64, device=DEVICE)
    arguments = logits_BV.to(DEVICE), params_5B.to(DEVICE)
    out = tokens_X[2:6]
    assert sampling.sample_tokens(*arguments, may_filter=may_filter, out=out) is out
    assert tokens_X.tolist() == [-5, -5, *run(logits_BV, params_5B), -5, -5]


@needs_triton
def test_greedy_tokens_are_written_where_the_caller_wants_them() -> None:
    from moe_engine.kernels import greedy

    logits_BV = random_logits(3, 3000, 2.0)
    for take in (greedy.greedy_tokens, lambda logits, out: greedy_tokens(logits, out=out)):
        tokens_X = torch.full((5,), -5, dtype=torch.int64, device=DEVICE)
        out = tokens_X[1:4]
        assert take(logits_BV.to(DEVICE), out) is out
        assert tokens_X.tolist() == [-5, *logits_BV.argmax(1).tolist(), -5]


@needs_triton
def test_one_launch_where_no_row_may_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_engine.kernels import sampling
    from moe_engine.kernels.launch import arrival_counters, launch_kernel

    launched = []

    def launch_and_count(kernel: object, *args: object, **options: object) -> None:
        launched.append(kernel)
        launch_kernel(kernel, *args, **options)

    monkeypatch.setattr(sampling, "launch_kernel", launch_and_count)
    logits_BV, params_5B = random_logits(3, 2100, 2.0), random_plain_params(3, [1.0, 0.0])
    tokens = run(logits_BV, params_5B)
    assert launched == [sampling.start_kernel]
    assert not arrival_counters(torch.empty(0, device=DEVICE).device).any()
    monkeypatch.setattr(sampling, "MAX_ROWS", 2)
    assert run(logits_BV, params_5B) == tokens
    assert len(launched) == 3


# The operator.


def test_reference_writes_to_out_and_holds_the_caller_to_its_promise() -> None:
    logits_BV, params_5B = random_logits(4, 50, 2.0), random_plain_params(4, [1.0, 0.0])
    tokens_B = sample_tokens(logits_BV, params_5B)
    out = torch.empty(4, dtype=torch.int64)
    assert sample_tokens(logits_BV, params_5B, may_filter=False, out=out) is out
    assert torch.equal(out, tokens_B)
    params_5B[2, 0] = 0.5
    with pytest.raises(AssertionError):
        sample_tokens(logits_BV, params_5B, may_filter=False)
    for wrong in (torch.empty(3, dtype=torch.int64), torch.empty(4, dtype=torch.int32)):
        with pytest.raises(AssertionError):
            sample_tokens(logits_BV, params_5B, out=wrong)
        with pytest.raises(AssertionError):
            greedy_tokens(logits_BV, out=wrong)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, False),
        ({"top_k": 1}, True),
        ({"top_k": 49}, True),
        ({"top_k": 50}, False),
        ({"top_p": math.nextafter(1.0, 0.0)}, True),
        ({"min_p": 5e-324}, True),
        ({"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.5}, False),
    ],
)
def test_rows_that_filter(values: dict[str, float], expected: bool) -> None:
    others_52 = make_params(2, temperature=[0.0, 1.0], top_k=[3, 0])
    params_53 = torch.cat([others_52, make_params(1, **values)], dim=1)
    assert any_filter(params_53.numpy(), 50) == expected
    assert not any_filter(np.empty((5, 0)), 50)


# Real sizes.

V = 151_936


@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("num_rows", [1, 17, 64, 256, 1025])
def test_real_sizes(num_rows: int, spread: float, dtype: torch.dtype) -> None:
    logits_BV = (torch.randn(num_rows, V, device=DEVICE) * spread).to(dtype)
    params_5B = random_plain_params(num_rows, [1.0, 0.6, 1e-5, 2.0])
    tokens = run(logits_BV, params_5B)
    some = slice(None, None, max(1, num_rows // 20))
    assert_drawn(tokens[some], logits_BV[some], params_5B[:, some])
    assert run(logits_BV, params_5B, may_filter=True) == tokens
    assert run(logits_BV[-1:], params_5B[:, -1:]) == tokens[-1:]
    mixed_5B = random_params(num_rows, V, seed=num_rows)
    mixed_5B[:, 1::2] = params_5B[:, 1::2]
    assert run(logits_BV, mixed_5B, may_filter=True)[1::2] == tokens[1::2]


@needs_gpu
@pytest.mark.parametrize("num_rows", [1, 64])
def test_a_graph_replays_with_other_logits_and_parameters(num_rows: int) -> None:
    logits_BV = torch.zeros(num_rows, V, device=DEVICE, dtype=BF16)
    params_5B = make_params(num_rows).to(DEVICE)
    out = torch.empty(num_rows, dtype=torch.int64, device=DEVICE)
    sample_tokens(logits_BV, params_5B, may_filter=False, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_tokens(logits_BV, params_5B, may_filter=False, out=out)
    for _ in range(4):
        logits_BV.copy_(torch.randn(num_rows, V, device=DEVICE) * 3)
        params_5B.copy_(random_plain_params(num_rows, [1.0, 0.7]))
        graph.replay()
        assert out.tolist() == sample_tokens(logits_BV, params_5B).tolist()
        assert_drawn(out.tolist(), logits_BV, params_5B.cpu())
