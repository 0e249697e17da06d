"""The sampling operators against plain numpy and against transformers' logits processors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moe_engine.ops.reference import sampling as ops

ALMOST_ONE = math.nextafter(1.0, 0.0)
SHAPES = [(1, 1), (3, 1), (1, 7), (4, 7), (5, 1000)]
INF = math.inf


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def full(num_rows: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((num_rows,), value, dtype=dtype)


def numpy_softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


# Filters and penalties against transformers.


@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
@pytest.mark.parametrize("top_k", [1, 2, 6, 500])
def test_top_k_matches_transformers(num_rows, vocab_size, top_k):
    logits = random_logits(num_rows, vocab_size)
    top_k = min(top_k, vocab_size)
    expected = TopKLogitsWarper(top_k)(None, logits)
    actual = ops.mask_top_k(logits, full(num_rows, top_k, torch.int64), top_k)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_matches_transformers(num_rows, vocab_size, top_p):
    logits = random_logits(num_rows, vocab_size)
    expected = TopPLogitsWarper(top_p)(None, logits)
    assert torch.equal(ops.mask_top_p(logits, full(num_rows, top_p, torch.float64)), expected)


@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.3, 1.0])
def test_min_p_matches_transformers(num_rows, vocab_size, min_p):
    logits = random_logits(num_rows, vocab_size)
    expected = MinPLogitsWarper(min_p)(None, logits)
    assert torch.equal(ops.mask_min_p(logits, full(num_rows, min_p)), expected)


@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
@pytest.mark.parametrize("penalty", [0.3, 1.0, 1.7])
def test_repetition_penalty_matches_transformers(num_rows, vocab_size, penalty):
    logits = random_logits(num_rows, vocab_size)
    logits[:, 0] = 0.0
    token_ids = torch.randint(
        vocab_size, (num_rows, 20), generator=torch.Generator().manual_seed(1)
    )
    seen = torch.zeros(num_rows, vocab_size, dtype=torch.bool).scatter_(1, token_ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(token_ids, logits)
    actual = ops.apply_repetition_penalty(logits, seen, full(num_rows, penalty))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_each_row_follows_its_own_parameter():
    logits = random_logits(1, 50).expand(3, 50) / 5
    top_k = ops.mask_top_k(logits, torch.tensor([1, 5, 50]), 50)
    assert torch.isfinite(top_k).sum(dim=1).tolist() == [1, 5, 50]
    for mask, values in (
        (ops.mask_top_p, torch.tensor([0.1, 0.6, 0.95], dtype=torch.float64)),
        (ops.mask_min_p, torch.tensor([0.9, 0.2, 0.01])),
    ):
        together = mask(logits, values)
        alone = torch.cat([mask(logits[i : i + 1], values[i : i + 1]) for i in range(3)])
        assert torch.equal(together, alone)
        assert len(set(torch.isfinite(together).sum(dim=1).tolist())) == 3


# Penalties by hand.


def test_output_penalties_follow_openai_formula():
    logits = random_logits(2, 6)
    counts = torch.tensor([[0, 1, 2, 0, 5, 1], [3, 0, 0, 1, 0, 0]], dtype=torch.int32)
    frequency, presence = torch.tensor([0.5, -2.0]), torch.tensor([1.5, 0.25])
    actual = ops.apply_output_penalties(logits, counts, frequency, presence)
    for row in range(2):
        for token in range(6):
            count = int(counts[row, token])
            expected = float(logits[row, token])
            expected -= count * float(frequency[row])
            expected -= float(presence[row]) if count else 0.0
            assert float(actual[row, token]) == pytest.approx(expected, abs=1e-5)


def test_penalties_leave_minus_infinity_and_their_arguments_alone():
    logits = torch.tensor([[-INF, 2.0, -3.0]])
    original = logits.clone()
    counts = torch.ones(1, 3, dtype=torch.int32)
    assert ops.apply_output_penalties(logits, counts, full(1, -2.0), full(1, -2.0))[0, 0] == -INF
    penalized = ops.apply_repetition_penalty(logits, counts > 0, full(1, 2.0))
    assert penalized.tolist() == [[-INF, 1.0, -6.0]]
    assert torch.equal(logits, original)


# Boundaries of the filters.


def test_top_k_keeps_ties_with_the_last_one():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = torch.isfinite(ops.mask_top_k(logits, torch.tensor([2]), 2))
    assert kept.tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (5e-324, [1]),
        (0.5, [1]),
        (math.nextafter(0.5, 1), [1, 0]),
        (0.75, [1, 0]),
        (ALMOST_ONE, [1, 0, 2]),
        (1.0, [1, 0, 2]),
    ],
)
def test_top_p_stops_exactly_where_the_sum_reaches_it(top_p, kept):
    logits = torch.tensor([[0.25, 0.5, 0.25, 0.0]]).log()
    masked = ops.mask_top_p(logits, full(1, top_p, torch.float64))
    assert torch.isfinite(masked)[0].nonzero().flatten().tolist() == sorted(kept)


def test_top_p_prefers_lower_ids_among_equals():
    masked = ops.mask_top_p(torch.zeros(1, 100), full(1, 0.1, torch.float64))
    assert torch.isfinite(masked)[0].nonzero().flatten().tolist() == list(range(10))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40), st.floats(1e-6, 1))
def test_top_p_keeps_the_smallest_sufficient_set(values, top_p):
    logits = torch.tensor([values])
    kept = torch.isfinite(ops.mask_top_p(logits, full(1, top_p, torch.float64)))[0].numpy()
    probs = numpy_softmax(logits[0].numpy())
    assert kept.any()
    assert probs[kept].sum() >= top_p - 1e-5
    assert probs[kept].sum() - probs[kept].min() <= top_p + 1e-5
    if not kept.all():
        assert logits[0].numpy()[kept].min() >= logits[0].numpy()[~kept].max()


# Temperature.


@pytest.mark.parametrize("temperature", [1e-5, 0.3, 1.0, 2.0])
def test_temperature_divides(temperature):
    logits = random_logits(3, 20)
    actual = ops.scale_by_temperature(logits, full(3, temperature))
    np.testing.assert_allclose(actual.numpy(), logits.numpy() / np.float32(temperature), rtol=1e-6)


def test_extreme_logits_survive_a_small_temperature():
    logits = torch.tensor(
        [[3e38, -3e38, 0.0], [INF, 1.0, -INF], [-INF, -INF, 5.0], [-INF, -INF, -INF]]
    )
    scaled = ops.scale_by_temperature(logits, full(4, 1e-5))
    probs = torch.softmax(scaled, dim=-1)
    assert probs.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]


def test_nan_becomes_minus_infinity_and_the_caller_keeps_its_logits():
    logits = torch.tensor([[math.nan, 1.0, INF, -INF]], dtype=torch.bfloat16)
    cleaned = ops.to_float32_without_nan(logits)
    assert cleaned.dtype == torch.float32
    assert cleaned.tolist() == [[-INF, 1.0, INF, -INF]]
    assert logits.isnan().any()
    already_clean = torch.ones(1, 1)
    assert ops.to_float32_without_nan(already_clean).data_ptr() != already_clean.data_ptr()


# The draw.


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(0, 5), *SHAPES])
def test_draw_inverts_the_cumulative_distribution_in_id_order(num_rows, vocab_size):
    logits = random_logits(num_rows, vocab_size)
    rng = np.random.default_rng(0)
    uniform = np.empty(num_rows)
    expected = []
    for row in range(num_rows):
        sums = np.concatenate([[0.0], numpy_softmax(logits[row].numpy()).cumsum()])
        token = int(rng.choice(np.flatnonzero(np.diff(sums) > 1e-5)))
        uniform[row] = (sums[token] + sums[token + 1]) / 2
        expected.append(token)
    actual = ops.draw_tokens(logits, torch.from_numpy(uniform))
    assert actual.dtype == torch.int64
    assert actual.tolist() == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.just(-INF), st.floats(-200, 200, width=32)), min_size=1, max_size=30),
    st.one_of(st.just(0.0), st.just(ALMOST_ONE), st.floats(0, 1, exclude_max=True)),
)
def test_draw_never_takes_an_impossible_token(values, uniform):
    logits = ops.scale_by_temperature(torch.tensor([values]), full(1, 1.0))
    token = int(ops.draw_tokens(logits, full(1, uniform, torch.float64)))
    assert torch.softmax(logits, dim=-1)[0, token] > 0


@pytest.mark.parametrize("uniform", [0.0, 0.3, ALMOST_ONE])
def test_draw_takes_the_only_possible_token(uniform):
    logits = torch.full((7, 7), -INF)
    logits.fill_diagonal_(-50.0)
    assert ops.draw_tokens(logits, full(7, uniform, torch.float64)).tolist() == list(range(7))


def test_draw_reaches_both_ends():
    logits = torch.tensor([[-INF, 0.0, 1.0, 0.5, -INF]]).expand(2, 5)
    uniform = torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64)
    assert ops.draw_tokens(logits, uniform).tolist() == [1, 3]


def test_draw_resolves_uniforms_beyond_float32():
    uniform = torch.tensor([0.5 - 1e-12, 0.5, 0.5 + 1e-12], dtype=torch.float64)
    assert ops.draw_tokens(torch.zeros(3, 2), uniform).tolist() == [0, 1, 1]


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 10, 1000, 4099])
def test_largest_uniform_takes_the_last_possible_token(vocab_size):
    logits = random_logits(50, vocab_size, seed=vocab_size).clamp(min=-8)
    tokens = ops.draw_tokens(logits, full(50, ALMOST_ONE, torch.float64))
    assert tokens.tolist() == [vocab_size - 1] * 50


def test_draws_follow_the_distribution():
    num_draws = 40_000
    logits = torch.tensor([2.0, 0.0, -1.0, 1.5, -INF, 0.7, -4.0])
    uniform = torch.rand(num_draws, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    tokens = ops.draw_tokens(logits.expand(num_draws, -1), uniform)
    observed = np.bincount(tokens.numpy(), minlength=7)
    expected = numpy_softmax(logits.numpy()) * num_draws
    assert observed[4] == 0
    possible = expected > 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 20.5  # the 0.999 quantile for 5 degrees of freedom


# Greedy choice and log-probabilities.


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[1.0, 4.0, 4.0], [2.0, 2.0, 2.0], [-INF, -INF, -INF], [0.0, 1.0, INF]])
    assert ops.greedy_tokens(logits).tolist() == [1, 0, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(0, 5), *SHAPES])
def test_top_logprobs_match_log_softmax(num_rows, vocab_size, dtype):
    logits = random_logits(num_rows, vocab_size).to(dtype)
    token_ids = torch.arange(num_rows) * 5 % vocab_size
    num_top = min(5, vocab_size)
    logprobs, ranks, top_ids, top_logprobs = ops.top_logprobs(logits, token_ids, num_top)
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row in range(num_rows):
        order = sorted(range(vocab_size), key=lambda i, row=row: (-float(logits[row, i]), i))
        assert top_ids[row].tolist() == order[:num_top]
        assert int(ranks[row]) == order.index(int(token_ids[row])) + 1
        torch.testing.assert_close(
            top_logprobs[row].double(), expected[row, top_ids[row]], rtol=1e-5, atol=1e-5
        )
        assert float(logprobs[row]) == pytest.approx(float(expected[row, token_ids[row]]), rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, INF, -INF]), st.floats(width=32)),
        min_size=1,
        max_size=20,
    )
)
def test_ranks_are_the_places_of_a_sort_by_logit_then_id(values):
    cleaned = [-INF if math.isnan(value) else value for value in values]
    if max(cleaned) == -INF:
        cleaned[0] = 0.0
    cleaned = [min(value, torch.finfo(torch.float32).max) for value in cleaned]
    order = sorted(range(len(values)), key=lambda i: (-cleaned[i], i))
    logits = torch.tensor([values]).expand(len(values), -1)
    _, ranks, top_ids, top_logprobs = ops.top_logprobs(
        logits, torch.arange(len(values)), len(values)
    )
    assert top_ids[0].tolist() == order
    assert [order[rank - 1] for rank in ranks.tolist()] == list(range(len(values)))
    assert not top_logprobs.isnan().any()


def test_no_alternatives_can_be_asked_for():
    logprobs, ranks, top_ids, _ = ops.top_logprobs(torch.zeros(2, 3), torch.tensor([0, 2]), 0)
    assert top_ids.shape == (2, 0)
    assert ranks.tolist() == [1, 3]
    assert logprobs.tolist() == pytest.approx([-math.log(3)] * 2)


# Independence of the batch.


@pytest.mark.parametrize("vocab_size", [1, 7, 33, 1000, 4099])
def test_rows_are_bit_identical_in_any_batch(vocab_size):
    num_rows = 9
    logits = random_logits(num_rows, vocab_size, seed=vocab_size)
    uniform = torch.rand(num_rows, dtype=torch.float64)
    temperature = torch.linspace(0.4, 1.6, num_rows)
    top_p = torch.linspace(0.3, 0.99, num_rows, dtype=torch.float64)

    def outcomes(rows: slice) -> list[torch.Tensor]:
        num = len(range(*rows.indices(num_rows)))
        scaled = ops.scale_by_temperature(logits[rows], temperature[rows])
        masked = ops.mask_top_p(ops.mask_min_p(scaled, full(num, 0.01)), top_p[rows])
        tokens = ops.draw_tokens(masked, uniform[rows])
        return [masked, tokens, *ops.top_logprobs(logits[rows], tokens, 1)]

    together = outcomes(slice(0, num_rows))
    for size in (1, 2, 4):
        for start in range(0, num_rows, size):
            rows = slice(start, start + size)
            for whole, part in zip(together, outcomes(rows), strict=True):
                assert torch.equal(whole[rows], part)


def test_softmax_of_a_row_does_not_depend_on_the_batch_or_the_threads():
    # What the operators rely on torch for; a plain sum over such rows fails this.
    logits = random_logits(5, 151_936)
    num_threads = torch.get_num_threads()
    try:
        for softmax in (torch.softmax, torch.log_softmax):
            torch.set_num_threads(1)
            together = softmax(logits, dim=-1)
            torch.set_num_threads(2)
            alone = torch.cat([softmax(logits[i : i + 1].clone(), dim=-1) for i in range(5)])
            assert torch.equal(together, alone)
    finally:
        torch.set_num_threads(num_threads)
