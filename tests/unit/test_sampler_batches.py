"""A row's token does not depend on its batch, and the host never waits for the device."""

import numpy as np
import pytest
import torch

from moe_engine.engine.sampler import Sampler
from moe_engine.ops.sampling import any_filter
from moe_engine.types.sampling import SamplingParams
from tests.unit.sampler_reference import (
    GREEDY,
    Reference,
    admit,
    random_sequences,
    rows_of,
    sampler_of,
)


@pytest.mark.parametrize("vocab_size", [1, 7, 1000])
def test_a_row_is_sampled_alike_in_any_batch(vocab_size):
    rng = np.random.default_rng(vocab_size)
    references = random_sequences(rng, 12, vocab_size)
    logits = torch.from_numpy(rng.standard_normal((12, vocab_size)) * 3)
    rows = rows_of(references, rng.random(12).tolist())

    def tokens_of(groups: list[list[int]]) -> list[int]:
        sampler, tokens = sampler_of(vocab_size, *references), {}
        for group in groups:
            found = sampler.sample(logits[group], [rows[i] for i in group]).tolist()
            tokens.update(zip(group, found, strict=True))
        return [tokens[i] for i in range(12)]

    together = tokens_of([list(range(12))])
    assert tokens_of([[i] for i in range(12)]) == together
    for _ in range(8):
        order, cut = rng.permutation(12).tolist(), int(rng.integers(12))
        assert tokens_of([order[:cut], order[cut:]]) == together


def test_sampling_does_not_change_the_logits():
    rng = np.random.default_rng(3)
    references = random_sequences(rng, 10, 30)
    logits = torch.randn(10, 30)
    original = logits.clone()
    sampler_of(30, *references).sample(logits, rows_of(references, [0.5] * 10))
    assert torch.equal(logits, original)


def test_draws_in_pieces_are_the_same(monkeypatch):
    rng = np.random.default_rng(8)
    references = random_sequences(rng, 25, 50)
    logits = torch.from_numpy(rng.standard_normal((25, 50)) * 3)
    rows = rows_of(references, rng.random(25).tolist())
    expected = sampler_of(50, *references).sample(logits, rows)
    monkeypatch.setattr("moe_engine.ops.reference.sampling._DRAW_ROWS_AT_ONCE", 4)
    assert torch.equal(sampler_of(50, *references).sample(logits, rows), expected)


# Who can do without the sampler.


@pytest.mark.parametrize(
    ("options", "is_argmax"),
    [
        ({}, True),
        ({"temperature": 1e-6, "top_p": 0.5, "top_k": 3, "logprobs": 5, "min_tokens": 0}, True),
        ({"temperature": 1e-4}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"min_tokens": 2}, False),  # the stop token must not be taken too early
        ({"repetition_penalty": 1.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"presence_penalty": -0.1}, False),
    ],
)
def test_only_plain_greedy_rows_are_an_argmax(options, is_argmax):
    plain = Reference(GREEDY, [1], stop_ids=[4])
    other = Reference(SamplingParams(**({"temperature": 0.0} | options)), [1], stop_ids=[4])
    both = sampler_of(20, plain, other)
    assert both.is_argmax([1]) == both.is_argmax([0, 1]) == is_argmax
    assert both.is_argmax([0])
    assert both.is_argmax([])
    both.retire(1)
    assert both.is_argmax([0, 1])  # nothing of a retired sequence stays behind


def test_rows_are_plain_unless_something_changes_their_logits():
    options = (
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "logprobs": 2}, True),
        ({"logit_bias": {1: 1.0}}, False),
        ({"min_tokens": 2}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"presence_penalty": -0.1}, False),
    )
    references = [Reference(SamplingParams(**some), [1], stop_ids=[4]) for some, _ in options]
    sampler = sampler_of(20, *references)
    for seq_id, (_, is_plain) in enumerate(options):
        assert sampler.is_plain([seq_id]) == sampler.is_plain([0, seq_id]) == is_plain
    sampler.retire(1)
    assert sampler.is_plain([0, 1])  # nothing of a retired sequence stays behind


def test_rows_filter_if_a_draw_may_lose_a_token():
    options = (
        ({"temperature": 0.7}, False),
        ({"temperature": 0.7, "top_k": 3}, True),
        ({"temperature": 0.7, "top_k": 20}, False),  # as many as the vocabulary has
        ({"temperature": 0.7, "top_k": -1}, False),
        ({"temperature": 0.7, "top_p": 0.99}, True),
        ({"temperature": 0.7, "min_p": 0.01}, True),
        ({"temperature": 1e-6, "top_k": 3, "top_p": 0.5, "min_p": 0.1}, False),
        ({"temperature": 0.7, "top_k": 3, "repetition_penalty": 1.1}, True),
    )
    sampler = sampler_of(20, *(Reference(SamplingParams(**some), [1]) for some, _ in options))
    for seq_id, (_, filters) in enumerate(options):
        assert sampler.filters([seq_id]) == sampler.filters([0, seq_id]) == filters
        assert any_filter(sampler.draw_params([seq_id], [0.5]), 20) == filters
    assert not sampler.filters([])
    sampler.retire(1)
    assert not sampler.filters([0, 1])  # nothing of a retired sequence stays behind


def test_draw_params_say_what_each_row_asked_for():
    options = (
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"temperature": 9e-6, "min_p": 0.25},
        {"top_k": -1},
        {"top_k": 50},  # as many as the vocabulary has
    )
    sampler = sampler_of(50, *(Reference(SamplingParams(**some), [1]) for some in options))
    params_5B = sampler.draw_params([2, 0, 1, 3], [0.25, 0.5, 0.75, 0.0])
    assert params_5B.T.tolist() == [
        [1.0, 0.0, 1.0, 0.0, 0.25],
        [0.6, 20.0, 0.95, 0.0, 0.5],
        [0.0, 0.0, 1.0, 0.25, 0.75],
        [1.0, 0.0, 1.0, 0.0, 0.0],
    ]
    assert sampler.draw_params([], []).shape == (5, 0)


def test_a_batch_that_is_only_greedy_copies_no_logits(monkeypatch):
    def refuse(logits):
        raise AssertionError("the logits were copied")

    monkeypatch.setattr("moe_engine.engine.sampler.to_float32_without_nan", refuse)
    logits = torch.randn(3, 500).bfloat16()
    logits[1, 7] = torch.inf
    logits[1, 3] = torch.nan
    logits[2] = torch.nan
    references = [Reference(GREEDY, [1]), Reference(GREEDY, [2], [3]), Reference(GREEDY, [4])]
    tokens = sampler_of(500, *references).sample(logits, rows_of(references, [0.5] * 3))
    assert tokens.tolist() == [int(logits[0].argmax()), 7, 0]

    biased = [*references, Reference(SamplingParams(temperature=0.0, logit_bias={2: 1.0}), [1])]
    with pytest.raises(AssertionError, match="copied"):
        sampler_of(500, *biased).sample(torch.randn(4, 500).bfloat16(), rows_of(biased, [0.5] * 4))


# The host never waits.


def all_features() -> list[Reference]:
    everything = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.05,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        min_tokens=3,
        logit_bias={3: 1.0},
    )
    return [
        Reference(GREEDY, [1]),
        Reference(SamplingParams(), [1]),
        Reference(SamplingParams(top_k=3), [1]),
        Reference(everything, [1, 2], [3], [4]),
    ]


def test_sampling_needs_no_value_from_the_device():
    # A meta tensor has no values: reading one, or a shape that depends on one, raises.
    sampler, references = Sampler(20, torch.device("meta")), all_features()
    for seq_id, reference in enumerate(references):
        admit(sampler, seq_id, reference)
    logits = torch.empty(4, 20, device="meta")
    tokens = sampler.sample(logits, rows_of(references, [0.5] * 4))
    assert tokens.shape == (4,)
    assert tokens.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sampling_on_cuda_does_not_synchronize_and_agrees_with_the_cpu():
    references = all_features()
    logits = torch.randn(4, 20)
    rows = rows_of(references, [0.5] * 4)
    expected = sampler_of(20, *references).sample(logits, rows)
    sampler, logits_on_device = Sampler(20, torch.device("cuda")), logits.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seq_id, reference in enumerate(references):
            admit(sampler, seq_id, reference)
        tokens = sampler.sample(logits_on_device, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tokens.cpu(), expected)
