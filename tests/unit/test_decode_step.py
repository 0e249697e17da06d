"""Decode steps in static memory give what steps laid out afresh give, whatever the padding."""

import random

import numpy as np
import pytest
import torch

from moe_engine.engine.decode import Choice
from moe_engine.types.sampling import SamplingParams
from tests.unit.runner_world import (
    ADJUSTED_KINDS,
    DRAWN_KINDS,
    GREEDY_KINDS,
    KINDS_OF_CHOICES,
    RunnerWorld,
    mixed_requests,
)


def assert_same_outputs(found, expected):
    for (tokens, logprobs, prompt), (e_tokens, e_logprobs, e_prompt) in zip(
        found, expected, strict=True
    ):
        assert tokens == e_tokens
        for some, others in ((logprobs, e_logprobs), (prompt, e_prompt)):
            assert [entry.token_id for entry in some] == [entry.token_id for entry in others]
            assert [entry.logprob for entry in some] == pytest.approx(
                [entry.logprob for entry in others], abs=1e-4
            )


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_requests_of_all_kinds_get_the_same_tokens(tmp_path, depth, chunk):
    requests = mixed_requests(random.Random(depth), 24)
    options = {"pipeline_depth": depth, "max_prefill_chunk": chunk}
    expected = RunnerWorld(tmp_path, **options).run(requests)
    world = RunnerWorld(tmp_path, with_decode_steps=True, **options)
    assert_same_outputs(world.run(requests), expected)
    assert {1, 2, 4, 8, 9} & set(world.runner._graphs.sizes_run)


@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_are_drawn_in_static_memory_whatever_was_there(tmp_path, depth):
    """Greedy rows and padding among them, in batches of several sizes, one after the other."""
    kinds = (*DRAWN_KINDS, GREEDY_KINDS[0], {"temperature": 0.6, "top_k": 20, "top_p": 0.95})
    requests = mixed_requests(random.Random(5), 24, kinds=kinds)
    expected = RunnerWorld(tmp_path, pipeline_depth=depth).run(requests)
    world = RunnerWorld(tmp_path, with_decode_steps=True, pipeline_depth=depth)
    assert_same_outputs(world.run(requests), expected)
    assert {4, 8, 9} <= set(world.runner._graphs.sizes_drawn)


def choices_of(world):
    return {choice for _, choice in world.runner._graphs.chosen}


@pytest.mark.parametrize("choice", Choice)
def test_a_batch_is_chosen_from_by_no_more_than_it_needs(tmp_path, choice):
    requests = mixed_requests(random.Random(6), 12, kinds=KINDS_OF_CHOICES[choice])
    expected = RunnerWorld(tmp_path).run(requests)
    world = RunnerWorld(tmp_path, with_decode_steps=True)
    assert_same_outputs(world.run(requests), expected)
    assert choices_of(world) == {choice}
    assert len(world.runner._graphs.chosen) == len(world.runner._graphs.sizes_run)


def test_one_row_that_filters_is_enough_to_filter(tmp_path):
    common = {"max_tokens": 6, "ignore_eos": True}
    kinds = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}]
    requests = [([1, 2], SamplingParams(**kind, **common, seed=1)) for kind in kinds]
    world = RunnerWorld(tmp_path, with_decode_steps=True)
    outputs = world.run(requests)
    assert choices_of(world) == {Choice.FILTER_AND_DRAW}
    alone = [RunnerWorld(tmp_path).run([request])[0] for request in requests]
    assert_same_outputs(outputs, alone)
    world.run(requests[:2])
    assert choices_of(world) == {Choice.FILTER_AND_DRAW, Choice.DRAW}


def test_nothing_is_chosen_before_logits_are_changed(tmp_path):
    world = RunnerWorld(tmp_path, with_decode_steps=True)
    world.run(mixed_requests(random.Random(6), 6, kinds=ADJUSTED_KINDS))
    assert world.runner._graphs.sizes_run
    assert not world.runner._graphs.chosen


def test_where_draws_wait_for_the_device_only_the_most_likely_are_chosen(tmp_path, monkeypatch):
    requests = mixed_requests(random.Random(9), 12, kinds=(*GREEDY_KINDS, *DRAWN_KINDS))
    expected = RunnerWorld(tmp_path).run(requests)
    elsewhere = torch.device("meta")
    monkeypatch.setattr("moe_engine.engine.decode.params_device", lambda device: elsewhere)
    world = RunnerWorld(tmp_path, with_decode_steps=True)
    assert world.runner._decode.choices == (Choice.MOST_LIKELY,)
    assert_same_outputs(world.run(requests), expected)
    assert len(world.runner._graphs.sizes_run) > len(world.runner._graphs.chosen)
    greedy = mixed_requests(random.Random(10), 4, kinds=GREEDY_KINDS)
    assert_same_outputs(world.run(greedy), RunnerWorld(tmp_path).run(greedy))
    assert choices_of(world) == {Choice.MOST_LIKELY}


@pytest.mark.parametrize("choice", Choice)
def test_tokens_reach_the_table_when_they_are_chosen(tmp_path, choice):
    world = RunnerWorld(tmp_path, with_decode_steps=True)
    runner, decode = world.runner, world.runner._decode
    table = runner._table
    with torch.inference_mode():
        table.tokens_NC.fill_(-1)
        table.tokens_NC[[3, 5], [0, 2]] = torch.tensor([11, 12], dtype=torch.int32)
        table.blocks_NB[[3, 5], 0] = torch.tensor([1, 2], dtype=torch.int32)
        before = table.tokens_NC.tolist()
        decode.load([3, 5], [0, 2])
        logits = decode.compute(4, runner._exchange.select(4))
        assert table.tokens_NC.tolist() == before
        # The second row draws the last token, unless top_k leaves it but one.
        top_k, almost_one = int(choice is Choice.FILTER_AND_DRAW), 1.0 - 2.0**-53
        decode.load_draw(np.array([[0, 1], [0, top_k], [1, 1], [0, 0], [0.5, almost_one]]))
        decode.choose(4, logits, choice)
    best = logits.argmax(1).tolist()
    assert logits[1].min() > -10  # so that every token has its part of the interval
    expected = [best[0], 96 if choice is Choice.DRAW else best[1]]
    assert decode.tokens(2).tolist() == expected
    before[3][1], before[5][3] = expected
    assert table.tokens_NC.tolist() == before


@pytest.mark.parametrize("size", range(1, 10))
def test_every_batch_size_gives_what_each_sequence_gives_alone(tmp_path, size):
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    choose = random.Random(size)
    prompts = [[choose.randrange(90) for _ in range(choose.randint(1, 9))] for _ in range(size)]
    world = RunnerWorld(tmp_path, with_decode_steps=True, prefix_cache=False, pipeline_depth=2)
    together = world.run([(prompt, params) for prompt in prompts])
    padded = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8, 9: 9}[size]
    assert padded in world.runner._graphs.sizes_run
    alone = RunnerWorld(tmp_path, prefix_cache=False)
    for prompt, output in zip(prompts, together, strict=True):
        assert [output] == alone.run([(prompt, params)])


def test_preempted_sequences_go_on_where_they_were(tmp_path):
    requests = mixed_requests(random.Random(3), 20)
    expected = RunnerWorld(tmp_path).run(requests)
    few = {"num_blocks": 16, "pipeline_depth": 2, "with_decode_steps": True}
    world = RunnerWorld(tmp_path, **few)
    assert_same_outputs(world.run(requests), expected)
    assert world.scheduler.stats().num_preemptions_total > 0


def test_padding_rows_write_nothing(tmp_path):
    world = RunnerWorld(tmp_path, with_decode_steps=True)
    runner, decode = world.runner, world.runner._decode
    before = [
        runner._table.tokens_NC.clone(),
        *(part.clone() for layer in range(2) for part in runner._kv.layer(layer)),
    ]
    with torch.inference_mode():
        decode.load([], [])
        logits = decode.compute(8, runner._exchange.select(8))
        for choice in decode.choices:
            decode.choose(8, logits, choice)
    after = [
        runner._table.tokens_NC,
        *(part for layer in range(2) for part in runner._kv.layer(layer)),
    ]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


def test_chunk_of_one_prompt_token_is_no_decode(tmp_path):
    """It samples nothing, so a graph would write a token over the prompt."""
    world = RunnerWorld(tmp_path, with_decode_steps=True, max_prefill_chunk=1)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompt = list(range(1, 10))
    [(tokens, _, _)] = world.run([(prompt, params)])
    assert len(world.runner._graphs.sizes_run) == 4  # the last prompt token and three outputs
    [(expected, _, _)] = RunnerWorld(tmp_path).run([(prompt, params)])
    assert tokens == expected


@pytest.mark.parametrize("with_decode_steps", [True, False])
def test_logits_that_are_not_numbers_are_never_the_most_likely(tmp_path, with_decode_steps):
    world = RunnerWorld(tmp_path, with_decode_steps=with_decode_steps)
    model = world.runner._model

    def broken(x_RH):
        logits = torch.zeros(len(x_RH), 97)
        logits[:, 7], logits[:, 3] = 5.0, torch.nan
        return logits

    model.logits = broken
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    [(tokens, _, _)] = world.run([([1, 2], params)])
    assert tokens == [7, 7, 7]
