"""The last layer computes only the rows whose logits are needed, and computes them right."""

import random

import pytest
import torch

from moe_engine.checkpoint.dummy import fill_dummy
from moe_engine.layers import moe
from moe_engine.types.sampling import SamplingParams
from tests.unit.runner_world import ALL_KINDS, RunnerWorld, mixed_requests

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def make_world(directory, **options):
    """With weights so large that every layer counts."""
    world = RunnerWorld(directory, **options)
    fill_dummy(world.runner._model.weight_specs(), seed=1, std=0.3)
    return world


class Comparison:
    """Runs every step a second time, with all rows, and compares the needed ones.

    Attributes:
        steps: (number of rows, number of needed rows or None for all of them) of each step.
        full_TH: all final hidden states of the last step.
    """

    def __init__(self, model):
        self.steps = []
        model.register_forward_hook(self._compare)

    def _compare(self, model, args, x_RH):
        token_ids_T, step, needed = args
        rows_R = None if needed is None else needed.rows_R
        self.steps.append((len(token_ids_T), None if rows_R is None else len(rows_R)))
        self.full_TH = model.forward(token_ids_T, step)
        expected_RH = self.full_TH if rows_R is None else self.full_TH[rows_R]
        torch.testing.assert_close(x_RH, expected_RH, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [{}, {"num_hidden_layers": 1}, {"mlp_only_layers": [1]}])
def test_needed_rows_are_those_of_a_step_with_all_rows(tmp_path, model):
    """Chunks, whole prompts and decodes together, with scored prompts among them."""
    world = make_world(tmp_path, model=model, max_prefill_chunk=7)
    comparison = Comparison(world.runner._model)
    world.run(mixed_requests(random.Random(1), 24, kinds=ALL_KINDS))
    assert any(num is not None and 0 < num < total for total, num in comparison.steps)
    assert any(num is None for _, num in comparison.steps)
    world.run([(list(range(20)), SamplingParams(**GREEDY, max_tokens=1))])
    assert comparison.steps[-3:] == [(7, 0), (7, 0), (6, 1)]


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_scored_prompts_have_the_logits_of_their_own_rows(tmp_path, chunk):
    prompt = list(range(30, 50))
    alone = make_world(tmp_path)
    comparison = Comparison(alone.runner._model)
    alone.run([(prompt, SamplingParams(**GREEDY, max_tokens=1))])
    logits_TV = alone.runner._model.logits(comparison.full_TH)
    targets_T = torch.tensor(prompt[1:])
    expected_T = logits_TV.log_softmax(-1)[:-1].gather(1, targets_T[:, None])[:, 0]

    world = make_world(tmp_path, max_prefill_chunk=chunk)
    scored = (prompt, SamplingParams(**GREEDY, max_tokens=3, prompt_logprobs=0))
    other = (list(range(9)), SamplingParams(**GREEDY, max_tokens=9))
    outputs = world.run([other, scored, other])
    entries = outputs[1][2]
    assert [entry.token_id for entry in entries] == prompt[1:]
    found_T = torch.tensor([entry.logprob for entry in entries])
    torch.testing.assert_close(found_T, expected_T, rtol=1e-3, atol=1e-3)


def test_experts_of_the_last_layer_see_only_the_needed_rows(tmp_path, monkeypatch):
    world = make_world(tmp_path, max_prefill_chunk=12)
    seen = []
    expert_ffn = moe.expert_ffn

    def recorded(x_RH, *args):
        seen.append(len(x_RH))
        return expert_ffn(x_RH, *args)

    monkeypatch.setattr(moe, "expert_ffn", recorded)
    world.run([(list(range(20)), SamplingParams(**GREEDY, max_tokens=2))])
    assert seen == [12, 0, 8, 1, 1, 1]
    seen.clear()
    world.run([(list(range(40, 49)), SamplingParams(**GREEDY, max_tokens=1, prompt_logprobs=0))])
    assert seen == [9, 9]
