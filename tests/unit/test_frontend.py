"""How the front end tells one prompt from many, and fans a request out into its completions."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_engine.engine.frontend import OpenRequest, merge_news, nth_params
from moe_engine.engine.llm import as_batch
from moe_engine.errors import EngineDeadError
from moe_engine.types.messages import RequestUpdate
from moe_engine.types.results import FinishReason
from moe_engine.types.sampling import MAX_N, SamplingParams
from moe_engine.types.step import Logprobs

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("prompt", ["", "a text", [1, 2, 3], (7,), CHAT, CHAT[:1]])
def test_one_prompt_of_any_kind_is_a_batch_of_one(prompt):
    assert as_batch(prompt) == [prompt]


@pytest.mark.parametrize(
    "prompts", [["a", "b"], [""], [[1, 2], [3]], [[]], [CHAT], [CHAT, "a", [1]], ("a", (1,)), []]
)
def test_a_sequence_of_prompts_is_a_batch_in_its_order(prompts):
    assert as_batch(prompts) == list(prompts)


@pytest.mark.parametrize("prompts", [np.array(["a", "b"]), {"a": 0, "b": 0}.keys(), iter("ab")])
def test_other_iterables_of_prompts_are_batches_too(prompts):
    assert as_batch(prompts) == ["a", "b"]


@pytest.mark.parametrize("prompt", [5, None, CHAT[0]])
def test_what_is_no_prompt_is_left_to_be_refused(prompt):
    assert as_batch(prompt) == [prompt]


@given(seed=st.integers(-(2**63), 2**63 - 1), n=st.integers(1, MAX_N))
def test_completions_of_a_seeded_request_have_seeds_of_their_own(seed, n):
    params = SamplingParams(n=n, seed=seed)
    seeds = [nth_params(params, index).seed for index in range(n)]
    assert seeds[0] == seed
    assert len(set(seeds)) == n


def test_the_largest_seed_wraps_around():
    params = SamplingParams(n=2, seed=2**63 - 1)
    assert nth_params(params, 1).seed == -(2**63)


def test_without_a_seed_no_completion_has_one():
    assert nth_params(SamplingParams(n=2), 1).seed is None


def test_only_the_first_completion_scores_the_prompt():
    params = SamplingParams(n=3, prompt_logprobs=0)
    assert [nth_params(params, index).prompt_logprobs for index in range(3)] == [0, None, None]


def test_everything_else_is_the_same_for_every_completion():
    params = SamplingParams(
        n=4,
        temperature=0.3,
        top_k=5,
        stop=["x"],
        stop_token_ids=[3],
        max_tokens=9,
        min_tokens=2,
        logprobs=1,
        logit_bias={1: 2.0},
        ignore_eos=True,
        skip_special_tokens=False,
    )
    assert nth_params(params, 3) == replace(params, n=1)


def test_refused_sequence_takes_back_those_of_the_request_that_were_sent() -> None:
    class Client:
        def __init__(self) -> None:
            self.submitted: list[str] = []
            self.aborted: list[str] = []

        def submit(self, request_id: str, *_: object) -> None:
            if len(self.submitted) == 2:
                raise EngineDeadError("dead")
            self.submitted.append(request_id)

        def abort(self, request_id: str) -> None:
            self.aborted.append(request_id)

    client = Client()
    front_end = SimpleNamespace(client=client, tokenizer=None)
    with pytest.raises(EngineDeadError):
        OpenRequest(front_end, "r", [1], SamplingParams(n=4), lambda _: None)
    assert client.aborted == client.submitted == ["r-0", "r-1"]


def updates_of_one_request(draw_tokens, with_logprobs):
    """Updates as the core makes them: a token each, the last one with a reason."""
    count = len(draw_tokens)
    return [
        RequestUpdate(
            "r",
            token_ids=[token],
            logprobs=[Logprobs(token, -1.0, 1)] if with_logprobs else [],
            prompt_logprobs=[Logprobs(7, -2.0, 2)] if number == 0 else [],
            finish_reason=FinishReason.STOP if number == count - 1 else None,
            stop_token_id=token if number == count - 1 else None,
            num_cached_tokens=16,
        )
        for number, token in enumerate(draw_tokens)
    ]


@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    cuts=st.sets(st.integers(1, 11)),
    with_logprobs=st.booleans(),
)
def test_merged_updates_bring_the_same_however_they_are_cut(tokens, cuts, with_logprobs):
    updates = updates_of_one_request(tokens, with_logprobs)
    edges = [0, *sorted(cut for cut in cuts if cut < len(updates)), len(updates)]
    pieces = [
        merge_news([(0, update) for update in updates[start:end]]) for start, end in pairwise(edges)
    ]
    assert all(len(piece) == 1 for piece in pieces)
    [(index, whole)] = merge_news([item for piece in pieces for item in piece])
    assert (index, whole.token_ids) == (0, tokens)
    assert [entry.token_id for entry in whole.logprobs] == (tokens if with_logprobs else [])
    assert len(whole.prompt_logprobs) == 1
    assert (whole.finish_reason, whole.stop_token_id) == (FinishReason.STOP, tokens[-1])


def test_only_neighbours_of_one_completion_are_merged_and_errors_stay():
    a, b = RequestUpdate("a", token_ids=[1]), RequestUpdate("b", token_ids=[2])
    error = EngineDeadError("dead")
    items = [(0, a), (1, b), (0, a), (0, a), (0, error), (0, error)]
    merged = merge_news(items)
    assert [index for index, _ in merged] == [0, 1, 0, 0, 0]
    assert merged[2][1].token_ids == [1, 1]
    assert merged[3][1] is merged[4][1] is error
