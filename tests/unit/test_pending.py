"""Results on their way to the host."""

import pytest
import torch

from moe_engine.engine.pending import LogprobRows, PendingLogprobs, PendingStep
from moe_engine.types.step import Logprobs, PromptLogprobs, SampledToken, StepResult


def logprob_rows(token_ids):
    """A row per token; the top is the token and the one after it."""
    tokens = torch.tensor(token_ids)
    top = torch.stack([tokens, tokens + 1], dim=1)
    return LogprobRows(tokens, -tokens.float(), tokens * 0 + 1, top, -top.float())


def entry(token, num_top):
    tops = [token, token + 1][:num_top]
    return Logprobs(token, -float(token), 1, tops, [-float(top) for top in tops])


def test_logprobs_of_several_parts_keep_their_order_and_width():
    pending = PendingLogprobs(
        [logprob_rows([5, 6]), logprob_rows([7])], rows=[0, 2, 3], num_tops=[0, 2, 1]
    )
    assert pending.result() == [entry(5, 0), entry(6, 2), entry(7, 1)]


def test_result_has_tokens_in_the_plans_order_and_logprobs_where_wanted():
    step = PendingStep(4, 1, is_reported=True)
    step.seq_ids = [9, 3, 8]
    step.tokens = torch.tensor([50, 51, 52])
    step.logprobs = PendingLogprobs([logprob_rows([51])], rows=[1], num_tops=[2])
    step.prompt_logprobs = [
        (
            3,
            1,
            [
                PendingLogprobs([logprob_rows([1, 2])], [0, 1], [1, 1]),
                PendingLogprobs([logprob_rows([3])], [0], [1]),
            ],
        )
    ]
    assert step.result() == StepResult(
        4,
        1,
        [SampledToken(9, 50), SampledToken(3, 51, entry(51, 2)), SampledToken(8, 52)],
        [PromptLogprobs(3, 1, [entry(1, 1), entry(2, 1), entry(3, 1)])],
    )


def test_step_without_samples_is_answered_all_the_same():
    assert PendingStep(4, 0, is_reported=True).result() == StepResult(4, 0)


class Event:
    """Like a CUDA event behind which the device has failed, or not."""

    def __init__(self, error=None):
        self.error = error
        self.num_waits = 0

    def synchronize(self):
        self.num_waits += 1
        if self.error:
            raise self.error


@pytest.mark.parametrize("is_reported", [True, False])
def test_whoever_asks_waits_for_the_device_and_hears_of_its_failure(is_reported):
    step = PendingStep(0, 0, is_reported)
    step.done = Event()
    assert (step.result() is not None) == is_reported
    assert step.done.num_waits == 1
    step.done = Event(RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        step.result()
