"""Log-probabilities of sampled tokens and of prompts."""

import pytest
import torch

from moe_engine.engine.sampler import Sampler, SampleRow
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import Logprobs
from tests.unit.sampler_reference import CPU, Reference, rows_of, sampler_of


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
    pending = sampler.logprobs(logits, tokens, range(4))
    assert pending.rows == [1, 2, 3]
    found = [None, *pending.result()]
    expected = torch.log_softmax(logits, dim=-1)
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
    (found,) = sampler.logprobs(logits, tokens, [0]).result()
    assert (found.token_id, found.rank, found.top_ids) == (1, 1, [1, 2])


@pytest.mark.parametrize("num_positions", [1, 128, 300])
def test_prompt_logprobs_match_log_softmax(num_positions):
    logits = torch.randn(num_positions, 11).to(torch.bfloat16)
    targets = torch.randint(11, (num_positions,))
    found = Sampler(11, CPU).prompt_logprobs(logits, targets, 2).result()
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
    logits, targets = torch.tensor([[0.0, 1.0]]), torch.tensor([0])
    (found,) = Sampler(2, CPU).prompt_logprobs(logits, targets, 20).result()
    assert found.top_ids == [1, 0]
    assert found.rank == 2
