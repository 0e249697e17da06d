"""The same logits and the same greedy tokens as transformers, in every layout."""

import math

import pytest
import torch

from moe_engine import MoEEngine, SamplingParams
from moe_engine.config import EngineConfig, ParallelConfig
from moe_engine.dist.groups import ParallelGroups
from moe_engine.engine.runtime import LocalPlace, RankRuntime
from moe_engine.types.step import GroupPlan, NewSequence, SequenceStep, StepPlan
from tests.dist.ranks import run_on_ranks
from tests.e2e.reference import NUM_NEW_TOKENS, VARIANTS

LAYOUTS = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (4, 2))
BLOCK_SIZE = 16


class LogitsOfAllPositions:
    """A rank's model run on whole sequences in one step, through a real step plan."""

    def __init__(self, references):
        self._references = references

    def __call__(self, groups: ParallelGroups) -> None:
        for reference in self._references.values():
            self._check(groups, reference)

    def _check(self, groups, reference):
        parallel = ParallelConfig(groups.layout.attention_tp, groups.layout.attention_dp)
        config = EngineConfig(model=str(reference.directory), parallel=parallel)
        runtime = RankRuntime(config, groups.layout, LocalPlace(groups.layout.rank, 8))
        runtime.groups = groups
        runtime.load(lambda *_: None)
        runtime.start(num_blocks=64)
        captured = []
        head = runtime.runner._model.logits
        runtime.runner._model.logits = lambda x: captured.append(head(x)) or captured[-1]
        sequences = [
            prompt + greedy
            for prompt, greedy in zip(reference.prompts, reference.greedy, strict=True)
        ]
        plan, numbers = plan_for(sequences, groups.layout.attention_dp)
        runtime.runner.launch(plan)
        if groups.layout.tp_rank != 0:
            return
        own = numbers[groups.layout.dp_rank]
        for logits, number in zip(captured, own, strict=True):
            torch.testing.assert_close(logits, reference.logits[number], rtol=0, atol=1e-4)


def plan_for(sequences, num_groups):
    """One step that scores every position of every sequence, dealt out over the groups."""
    groups = [GroupPlan() for _ in range(num_groups)]
    numbers = [[] for _ in range(num_groups)]
    next_block = [0] * num_groups
    for number, tokens in enumerate(sequences):
        dp_rank = number % num_groups
        num_blocks = math.ceil(len(tokens) / BLOCK_SIZE)
        blocks = list(range(next_block[dp_rank], next_block[dp_rank] + num_blocks))
        next_block[dp_rank] += num_blocks
        params = SamplingParams(prompt_logprobs=0)
        groups[dp_rank].admitted.append(NewSequence(number, tokens, len(tokens), params))
        groups[dp_rank].steps.append(SequenceStep(number, 0, len(tokens), blocks))
        numbers[dp_rank].append(number)
    return StepPlan(0, groups), numbers


@pytest.mark.parametrize(("tp", "dp"), LAYOUTS)
def test_logits_are_within_1e_4_of_transformers(references, tp, dp):
    run_on_ranks(LogitsOfAllPositions(references), tp, dp)


def assert_greedy_tokens_equal(reference, tp, dp, **options):
    """All prompts in one batch; log-probabilities of the chosen tokens agree too."""
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, logprobs=0)
    layout = {"attention_tp": tp, "attention_dp": dp, "block_size": 4, "dtype": "float32"}
    with MoEEngine(str(reference.directory), **layout, **options) as engine:
        results = engine.generate(reference.prompts, params)
    for number, result in enumerate(results):
        [output] = result.outputs
        assert list(output.token_ids) == reference.greedy[number], f"prompt {number}"
        prompt_len = len(reference.prompts[number])
        expected = reference.logits[number][prompt_len - 1 :].log_softmax(dim=-1)
        for position, entry in enumerate(output.logprobs):
            value = expected[position, output.token_ids[position]].item()
            assert entry.chosen.logprob == pytest.approx(value, abs=2e-4)


@pytest.mark.parametrize("variant", [variant.name for variant in VARIANTS])
@pytest.mark.parametrize(("tp", "dp"), LAYOUTS)
def test_greedy_tokens_equal_those_of_transformers(references, variant, tp, dp):
    assert_greedy_tokens_equal(references[variant], tp, dp, device="cpu")


@pytest.mark.parametrize("variant", [variant.name for variant in VARIANTS])
@pytest.mark.parametrize(
    ("tp", "dp", "exchange"),
    [(1, 1, "auto"), (2, 1, "replicated"), (2, 1, "collective"), (1, 2, "auto")],
)
def test_greedy_tokens_on_gpus_equal_those_of_transformers(references, variant, tp, dp, exchange):
    if torch.cuda.device_count() < tp * dp:
        pytest.skip(f"needs {tp * dp} NVIDIA GPU(s)")
    assert_greedy_tokens_equal(references[variant], tp, dp, device="cuda", exchange=exchange)
