"""The sampler against a row-by-row numpy reimplementation, and its promises about batches."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from moe_engine.engine.sampler import Sampler, SampleRow
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import Logprobs, NewSequence

CPU = torch.device("cpu")
ALMOST_ONE = math.nextafter(1.0, 0.0)
GREEDY = SamplingParams(temperature=0.0)
INF = math.inf


@dataclass
class Reference:
    """One sequence, sampled the slow way in float64."""

    params: SamplingParams
    prompt: list[int]
    outputs: list[int] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)

    def adjusted(self, logits: np.ndarray) -> np.ndarray:
        params, result = self.params, logits.astype(np.float64).copy()
        for token, bias in params.logit_bias.items():
            result[token] += bias
        if len(self.outputs) < params.min_tokens:
            result[self.stop_ids] = -INF
        for token in {*self.prompt, *self.outputs}:
            factor = params.repetition_penalty
            result[token] = result[token] * factor if result[token] < 0 else result[token] / factor
        for token in set(self.outputs):
            result[token] -= self.outputs.count(token) * params.frequency_penalty
            result[token] -= params.presence_penalty
        return result

    def probs(self, logits: np.ndarray) -> np.ndarray:
        params = self.params
        scaled = self.adjusted(logits) / params.temperature
        probs = _softmax(scaled)
        scaled[probs < params.min_p * probs.max()] = -INF
        if 0 < params.top_k < len(scaled):
            scaled[scaled < np.sort(scaled)[-params.top_k]] = -INF
        probs = _softmax(scaled)
        kept, total = [], 0.0
        for token in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
            if total < params.top_p:
                kept.append(token)
            total += probs[token]
        mask = np.zeros(len(probs), dtype=bool)
        mask[kept] = True
        return np.where(mask, probs, 0.0) / probs[mask].sum()

    def expected(self, logits: np.ndarray, rng: np.random.Generator) -> tuple[int, float]:
        """A token that can be sampled, and a uniform in the middle of its interval."""
        if self.params.temperature == 0:
            return int(self.adjusted(logits).argmax()), float(rng.random())
        probs = self.probs(logits)
        token = int(rng.choice(np.flatnonzero(probs > 1e-5)))
        return token, float(probs[:token].sum() + probs[token] / 2)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def random_params(rng: np.random.Generator, vocab_size: int) -> SamplingParams:
    def maybe(value, default):
        return value if rng.random() < 0.5 else default

    biased = rng.choice(vocab_size, size=min(3, vocab_size), replace=False).tolist()
    return SamplingParams(
        temperature=maybe(float(rng.uniform(0.2, 2)), 0.0 if rng.random() < 0.5 else 1.0),
        top_p=maybe(float(rng.uniform(0.05, 1)), 1.0),
        top_k=maybe(int(rng.integers(1, 2 * vocab_size + 1)), int(rng.integers(-1, 1))),
        min_p=maybe(float(rng.uniform(0, 0.5)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2)), 1.0),
        min_tokens=maybe(int(rng.integers(1, 5)), 0),
        logit_bias=maybe(
            dict(zip(biased, rng.uniform(-5, 5, len(biased)).tolist(), strict=True)), {}
        ),
    )


def random_sequences(rng, num: int, vocab_size: int) -> list[Reference]:
    return [
        Reference(
            random_params(rng, vocab_size),
            rng.integers(vocab_size, size=rng.integers(1, 10)).tolist(),
            rng.integers(vocab_size, size=rng.integers(0, 5)).tolist(),
            # With one token in the vocabulary nothing would be left to sample.
            rng.integers(1, vocab_size, size=2).tolist() if vocab_size > 1 else [],
        )
        for _ in range(num)
    ]


def admit(sampler: Sampler, seq_id: int, reference: Reference) -> None:
    token_ids = reference.prompt + reference.outputs
    sampler.admit(
        NewSequence(
            seq_id, token_ids, len(reference.prompt), reference.params, list(reference.stop_ids)
        )
    )


def sampler_of(vocab_size: int, *references: Reference) -> Sampler:
    sampler = Sampler(vocab_size, CPU)
    for seq_id, reference in enumerate(references):
        admit(sampler, seq_id, reference)
    return sampler


def rows_of(references: list[Reference], uniforms: list[float]) -> list[SampleRow]:
    return [
        SampleRow(seq_id, uniform, len(reference.outputs))
        for seq_id, (reference, uniform) in enumerate(zip(references, uniforms, strict=True))
    ]


def sample_one(params, logits, *, prompt=(0,), uniform=0.5, outputs=(), stop_ids=()) -> int:
    reference = Reference(params, list(prompt), list(outputs), list(stop_ids))
    logits = torch.as_tensor(logits)
    sampler = sampler_of(len(logits), reference)
    return int(sampler.sample(logits.unsqueeze(0), rows_of([reference], [uniform])))


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
    assert sampler.logprobs(torch.empty(0, 5), tokens, []) == []
    assert sampler.prompt_logprobs(torch.empty(0, 5), tokens, 3) == []


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


# What penalties remember.


def test_penalties_accumulate_over_steps():
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    sampler = sampler_of(3, Reference(params, [0, 0, 0]))
    logits = torch.tensor([[2.5, 2.0, 0.8]])
    tokens = [int(sampler.sample(logits, [SampleRow(0, 0.5, step)])) for step in range(6)]
    # Each choice takes 1 off: 2.5 2.0 .8 | 1.5 2.0 .8 | 1.5 1.0 .8 | .5 1.0 .8 | .5 0 .8 | .5 0 -.2
    assert tokens == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize("seed", range(4))
def test_readmission_continues_where_preemption_stopped(seed):
    rng = np.random.default_rng(seed)
    params = SamplingParams(
        temperature=0.0, frequency_penalty=0.7, presence_penalty=0.4, repetition_penalty=1.3
    )
    reference = Reference(params, [1, 2, 3])
    undisturbed = sampler_of(6, reference)
    sampler = sampler_of(6, reference)
    seq_id = 0
    for step in range(12):
        logits = torch.from_numpy(rng.standard_normal((1, 6)))
        if step in (3, 4, 9):
            sampler.retire(seq_id)
            seq_id += 1
            admit(sampler, seq_id, reference)
        token = int(undisturbed.sample(logits, [SampleRow(0, 0.5, step)]))
        assert int(sampler.sample(logits, [SampleRow(seq_id, 0.5, step)])) == token
        reference.outputs.append(token)


def test_sequences_do_not_share_penalties():
    params = SamplingParams(temperature=0.0, presence_penalty=2.0)
    sampler = sampler_of(2, Reference(params, [0]), Reference(params, [0]))
    logits = torch.tensor([[1.0, 0.0]])
    assert int(sampler.sample(logits, [SampleRow(0, 0.5, 0)])) == 0
    assert int(sampler.sample(logits, [SampleRow(1, 0.5, 0)])) == 0
    assert int(sampler.sample(logits, [SampleRow(0, 0.5, 1)])) == 1


def test_retired_sequences_are_forgotten():
    sampler = sampler_of(2, Reference(GREEDY, [0]))
    sampler.retire(0)
    with pytest.raises(KeyError):
        sampler.sample(torch.zeros(1, 2), [SampleRow(0, 0.5, 0)])
    admit(sampler, 0, Reference(GREEDY, [0]))


class SamplerMachine(RuleBasedStateMachine):
    """Any order of admissions, steps, preemptions and retirements against plain token lists."""

    VOCAB_SIZE = 5

    def __init__(self) -> None:
        super().__init__()
        self.sampler = Sampler(self.VOCAB_SIZE, CPU)
        self.references: dict[int, Reference] = {}
        self.next_id = 0

    def _admit(self, reference: Reference) -> None:
        admit(self.sampler, self.next_id, reference)
        self.references[self.next_id] = reference
        self.next_id += 1

    @rule(
        prompt=st.lists(st.integers(0, 4), min_size=1, max_size=4),
        frequency=st.sampled_from([0.0, 0.5]),
        presence=st.sampled_from([0.0, 0.75]),
        repetition=st.sampled_from([1.0, 2.0]),
        min_tokens=st.integers(0, 2),
    )
    def admit(self, prompt, frequency, presence, repetition, min_tokens):
        params = SamplingParams(
            temperature=0.0,
            frequency_penalty=frequency,
            presence_penalty=presence,
            repetition_penalty=repetition,
            min_tokens=min_tokens,
        )
        self._admit(Reference(params, prompt, stop_ids=[4]))

    @precondition(lambda self: self.references)
    @rule(data=st.data(), seed=st.integers(0, 2**20))
    def step(self, data, seed):
        seq_ids = data.draw(st.lists(st.sampled_from(sorted(self.references)), unique=True))
        logits = np.random.default_rng(seed).standard_normal((len(seq_ids), self.VOCAB_SIZE))
        logits = logits.astype(np.float32)
        rows = [SampleRow(i, 0.5, len(self.references[i].outputs)) for i in seq_ids]
        tokens = self.sampler.sample(torch.from_numpy(logits), rows).tolist()
        for seq_id, row_logits, token in zip(seq_ids, logits, tokens, strict=True):
            reference = self.references[seq_id]
            assert token == reference.adjusted(row_logits).argmax()
            reference.outputs.append(token)

    @precondition(lambda self: self.references)
    @rule(data=st.data(), comes_back=st.booleans())
    def retire(self, data, comes_back):
        seq_id = data.draw(st.sampled_from(sorted(self.references)))
        self.sampler.retire(seq_id)
        reference = self.references.pop(seq_id)
        if comes_back:
            self._admit(reference)


TestSamplerMachine = SamplerMachine.TestCase
TestSamplerMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


# Independence of the batch.


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


# Log-probabilities.


def test_logprobs_are_raw_and_only_for_rows_that_want_them():
    num_tops = [None, 0, 3, 20]
    references = [
        Reference(
            SamplingParams(
                temperature=0.5, logprobs=num, repetition_penalty=3.0, logit_bias={1: 9.0}
            ),
            [1, 2],
        )
        for num in num_tops
    ]
    logits = torch.randn(4, 10)
    rows = rows_of(references, [0.3, 0.5, 0.7, 0.9])
    sampler = sampler_of(10, *references)
    tokens = sampler.sample(logits, rows)
    found = sampler.logprobs(logits, tokens, rows)
    expected = torch.log_softmax(logits, dim=-1)
    assert found[0] is None
    for row, num_top in enumerate(num_tops[1:], start=1):
        order = logits[row].argsort(descending=True).tolist()
        token = int(tokens[row])
        assert found[row] == Logprobs(
            token_id=token,
            logprob=pytest.approx(float(expected[row, token])),
            rank=order.index(token) + 1,
            top_ids=order[:num_top],
            top_logprobs=pytest.approx(expected[row, order[:num_top]].tolist()),
        )


def test_greedy_token_has_rank_1_among_equals():
    reference = Reference(SamplingParams(temperature=0.0, logprobs=2), [0])
    sampler = sampler_of(4, reference)
    logits, rows = torch.tensor([[0.0, 5.0, 5.0, 5.0]]), [SampleRow(0, 0.5, 0)]
    tokens = sampler.sample(logits, rows)
    (found,) = sampler.logprobs(logits, tokens, rows)
    assert found is not None
    assert (found.token_id, found.rank, found.top_ids) == (1, 1, [1, 2])


@pytest.mark.parametrize("num_positions", [1, 128, 300])
def test_prompt_logprobs_match_log_softmax(num_positions):
    logits = torch.randn(num_positions, 11).to(torch.bfloat16)
    targets = torch.randint(11, (num_positions,))
    found = Sampler(11, CPU).prompt_logprobs(logits, targets, 2)
    expected = torch.log_softmax(logits.float(), dim=-1)
    assert [entry.token_id for entry in found] == targets.tolist()
    assert [entry.logprob for entry in found] == pytest.approx(
        expected.gather(1, targets.unsqueeze(1)).flatten().tolist()
    )
    best = torch.sort(logits.float(), dim=-1, descending=True, stable=True).indices
    assert [entry.top_ids for entry in found] == best[:, :2].tolist()
    ranks = (best == targets.unsqueeze(1)).nonzero()[:, 1] + 1
    assert [entry.rank for entry in found] == ranks.tolist()


def test_more_alternatives_than_tokens_report_all():
    (found,) = Sampler(2, CPU).prompt_logprobs(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 20)
    assert found.top_ids == [1, 0]
    assert found.rank == 2
