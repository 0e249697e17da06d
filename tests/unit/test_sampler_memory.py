"""What the sampler remembers of a sequence: penalties, over preemptions and retirements."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from moe_engine.engine.sampler import Sampler, SampleRow
from moe_engine.types.sampling import SamplingParams
from tests.unit.sampler_reference import CPU, GREEDY, Reference, admit, sampler_of


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
