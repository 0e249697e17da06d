"""The sampler against a row-by-row numpy reimplementation, and each feature alone."""

import math

import numpy as np
import pytest
import torch

from moe_engine.engine.sampler import Sampler
from moe_engine.types.sampling import SamplingParams
from tests.unit.sampler_reference import (
    ALMOST_ONE,
    CPU,
    GREEDY,
    INF,
    Reference,
    random_sequences,
    rows_of,
    sample_one,
    sampler_of,
)

# Against the reimplementation.


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 1), (3, 1), (1, 7), (8, 7), (6, 1000)])
def test_combined_features_match_the_slow_reference(num_rows, vocab_size, seed):
    rng = np.random.default_rng([seed, num_rows, vocab_size])
    references = random_sequences(rng, num_rows, vocab_size)
    sampler = sampler_of(vocab_size, *references)
    for _ in range(6):
        logits = (rng.standard_normal((num_rows, vocab_size)) * 3).astype(np.float32)
        chosen = [r.expected(row, rng) for r, row in zip(references, logits, strict=True)]
        rows = rows_of(references, [uniform for _, uniform in chosen])
        tokens = sampler.sample(torch.from_numpy(logits), rows)
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == [token for token, _ in chosen]
        for reference, (token, _) in zip(references, chosen, strict=True):
            reference.outputs.append(token)


@pytest.mark.parametrize("uniform", [0.0, 0.2, ALMOST_ONE])
def test_filtered_tokens_are_never_sampled(uniform):
    rng = np.random.default_rng(int(uniform * 10))
    references = random_sequences(rng, 40, 50)
    logits = (rng.standard_normal((40, 50)) * 3).astype(np.float32)
    sampler = sampler_of(50, *references)
    tokens = sampler.sample(torch.from_numpy(logits), rows_of(references, [uniform] * 40))
    for reference, row, token in zip(references, logits, tokens.tolist(), strict=True):
        if reference.params.temperature > 0:
            assert reference.probs(row)[token] > 0


def test_samples_follow_the_filtered_distribution():
    num_rows, vocab_size = 20_000, 6
    params = SamplingParams(temperature=0.8, top_k=4, top_p=0.95, logit_bias={2: 1.0})
    logits = np.array([1.0, 0.5, -1.0, 2.0, 0.3, -2.0], dtype=np.float32)
    reference = Reference(params, [0])
    sampler = sampler_of(vocab_size, *[reference] * num_rows)
    uniforms = np.random.default_rng(1).random(num_rows).tolist()
    tokens = sampler.sample(
        torch.from_numpy(logits).expand(num_rows, -1), rows_of([reference] * num_rows, uniforms)
    )
    observed = np.bincount(tokens.numpy(), minlength=vocab_size)
    expected = reference.probs(logits) * num_rows
    possible = expected > 0
    assert possible.sum() == 4
    assert observed[~possible].sum() == 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 16.3  # the 0.999 quantile for 3 degrees of freedom


# Greedy.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 1), (5, 1000)])
def test_greedy_equals_argmax(num_rows, vocab_size, dtype):
    logits = torch.randn(num_rows, vocab_size).to(dtype)
    references = [Reference(GREEDY, [0])] * num_rows
    tokens = sampler_of(vocab_size, *references).sample(
        logits, rows_of(references, [0.9] * num_rows)
    )
    assert torch.equal(tokens, logits.float().argmax(dim=-1))


def test_greedy_ignores_filters_and_uniform():
    params = SamplingParams(temperature=0.0, top_k=2, top_p=0.1, min_p=0.9)
    assert {sample_one(params, [1.0, 3.0, 3.0], uniform=u) for u in (0.0, 0.5, ALMOST_ONE)} == {1}


@pytest.mark.parametrize("temperature", [1e-300, 9e-6, 1e-5])
def test_tiny_temperature_takes_the_most_likely_token(temperature):
    params = SamplingParams(temperature=temperature)
    for logits in ([1.0, 1.1, -3e38], [3e38, -3e38, 1.0]):
        expected = int(np.argmax(logits))
        assert sample_one(params, logits, uniform=ALMOST_ONE) == expected


def test_uniform_keeps_its_double_precision():
    assert sample_one(SamplingParams(), [0.0, 0.0], uniform=0.5 - 1e-12) == 0


def test_empty_batch_gives_no_tokens():
    sampler = Sampler(5, CPU)
    tokens = sampler.sample(torch.empty(0, 5), [])
    assert tokens.shape == (0,)
    assert tokens.dtype == torch.int64
    assert sampler.logprobs(torch.empty(0, 5), tokens, []) is None
    assert sampler.prompt_logprobs(torch.empty(0, 5), tokens, 3).result() == []


# Single features.


@pytest.mark.parametrize("top_k", [-1, 0, 3, 10**9])
def test_top_k_off_or_beyond_the_vocabulary_keeps_every_token(top_k):
    params = SamplingParams(top_k=top_k)
    tokens = {sample_one(params, [0.0, 0.0, 0.0], uniform=u) for u in (0.1, 0.5, 0.9)}
    assert tokens == {0, 1, 2}


def test_top_k_and_top_p_act_after_min_p_on_what_is_left():
    # min_p leaves 0.4, 0.3 and 0.2; of these top_k leaves 4/7 and 3/7; top_p 0.55 leaves 4/7.
    # Were top_p taken of the original probabilities, it would leave two tokens.
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    params = SamplingParams(min_p=0.4, top_k=2, top_p=0.55)
    assert sample_one(params, logits, uniform=ALMOST_ONE) == 0


def test_logit_bias_changes_a_greedy_choice():
    params = SamplingParams(temperature=0.0, logit_bias={2: 5.0, 0: -100.0})
    assert sample_one(params, [9.0, 4.0, 0.0]) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_ids_wait_for_min_tokens(temperature):
    params = SamplingParams(temperature=temperature, min_tokens=2)
    logits = [0.0, 60.0, 50.0]
    # The vocabulary has no token 99, so it needs no mask.
    by_num_outputs = [
        sample_one(params, logits, outputs=[0] * num, stop_ids=[1, 99]) for num in range(4)
    ]
    assert by_num_outputs == [2, 2, 1, 1]


def test_logit_bias_cannot_bring_back_a_held_stop_id():
    params = SamplingParams(temperature=0.0, min_tokens=1, logit_bias={0: 100.0})
    assert sample_one(params, [9.0, 1.0], stop_ids=[0]) == 1


def test_repetition_penalty_counts_the_prompt_but_other_penalties_do_not():
    logits = [1.0, 0.9]
    assert sample_one(SamplingParams(temperature=0.0, repetition_penalty=2.0), logits) == 1
    params = SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    assert sample_one(params, logits, prompt=[0, 0]) == 0


def test_logit_bias_acts_before_the_repetition_penalty():
    # Biased first, token 0 is negative and doubled to -2; the other order would give -0.5.
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias={0: -2.0})
    assert sample_one(params, [1.0, -1.5]) == 1


def test_subnormal_repetition_penalty_does_not_break_the_row():
    params = SamplingParams(temperature=1.0, repetition_penalty=1e-60)
    assert sample_one(params, [0.5, 3.0, 0.0], prompt=[0, 2]) == 0


# Broken logits.


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_never_chosen_and_nothing_left_gives_token_0(temperature):
    params = SamplingParams(temperature=temperature, top_k=2, top_p=0.9, min_p=0.1)
    for uniform in (0.0, 0.5, ALMOST_ONE):
        assert sample_one(params, [math.nan, 1.0, math.nan], uniform=uniform) == 1
        assert sample_one(params, [math.nan] * 3, uniform=uniform) == 0
        assert sample_one(params, [-INF] * 3, uniform=uniform) == 0
        assert sample_one(params, [0.0, INF, 0.0], uniform=uniform) == 1


def test_a_broken_row_does_not_touch_its_neighbours():
    references = [Reference(SamplingParams(top_p=0.5), [0])] * 3
    logits = torch.tensor([[0.0, 9.0], [math.nan, math.nan], [9.0, 0.0]])
    tokens = sampler_of(2, *references).sample(logits, rows_of(references, [0.5] * 3))
    assert tokens.tolist() == [1, 0, 0]
