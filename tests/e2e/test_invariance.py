"""What must not change the tokens: cache, chunks, preemption, company, streaming, pipelining."""

import random

import pytest

from moe_engine import MoEEngine, SamplingParams

NUM_REQUESTS = 32
BASE = {"device": "cpu", "block_size": 4, "max_num_seqs": 64}


@pytest.fixture(scope="module")
def checkpoint(references):
    return str(references["sharded"].directory)


@pytest.fixture(scope="module")
def requests():
    """Prompts that often begin alike, with every kind of sampling."""
    choose = random.Random(5)
    common = [choose.randrange(250) for _ in range(70)]
    prompts, params = [], []
    for number in range(NUM_REQUESTS):
        own = [choose.randrange(250) for _ in range(choose.randrange(1, 40))]
        prompts.append(common[: choose.choice((0, 0, 33, 64, 70))] + own)
        kind = number % 4
        params.append(
            SamplingParams(
                temperature=0.0 if kind == 0 else 0.9,
                top_p=0.9 if kind == 1 else 1.0,
                top_k=20 if kind == 2 else 0,
                frequency_penalty=0.5 if kind == 3 else 0.0,
                repetition_penalty=1.2 if kind == 3 else 1.0,
                seed=number,
                max_tokens=choose.randrange(1, 40),
                min_tokens=1,
                ignore_eos=number % 5 == 0,
                logprobs=1,
                prompt_logprobs=0 if number % 8 == 0 else None,
            )
        )
    return prompts, params


def outcome(result):
    """What must be equal, with the log-probabilities apart (they differ in the last bits)."""
    [output] = result.outputs
    scores = [entry.chosen.logprob for entry in output.logprobs]
    scores += [entry.chosen.logprob for entry in result.prompt_logprobs or () if entry]
    return (output.token_ids, output.text, output.finish_reason), scores


@pytest.fixture(scope="module")
def alone(checkpoint, requests):
    """Each request by itself, without a prefix cache, its prompt in one piece."""
    with MoEEngine(checkpoint, **BASE, prefix_cache=False) as engine:
        return [outcome(engine.generate(*request)[0]) for request in zip(*requests, strict=True)]


def assert_same(results, alone):
    for result, (expected, expected_scores) in zip(results, alone, strict=True):
        got, scores = outcome(result)
        assert got == expected
        assert scores == pytest.approx(expected_scores, abs=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_cache": False},
        {},
        {"max_prefill_chunk": 1},
        {"max_prefill_chunk": 7},
        {"max_prefill_chunk": 64, "max_num_batched_tokens": 64},
        {"pipeline_depth": 2},
        {"attention_dp": 2, "pipeline_depth": 2, "max_prefill_chunk": 7},
    ],
    ids=str,
)
def test_batch_of_32_gives_the_same_tokens(checkpoint, requests, alone, options):
    with MoEEngine(checkpoint, **{**BASE, **options}) as engine:
        assert_same(engine.generate(*requests), alone)
        if options.get("prefix_cache", True):
            hits = engine.stats.prefix_hit_tokens_total
            assert_same(engine.generate(*requests), alone)
            assert engine.stats.prefix_hit_tokens_total > hits


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_requests_give_the_same_tokens(checkpoint, requests, alone, depth, prefix_cache):
    options = {"num_blocks": 60, "pipeline_depth": depth, "prefix_cache": prefix_cache}
    with MoEEngine(checkpoint, **BASE, **options) as engine:
        assert_same(engine.generate(*requests), alone)
        assert engine.stats.num_preemptions_total > 0
        assert engine.stats.num_free_blocks == engine.stats.num_blocks == 60


def test_stream_adds_up_to_the_whole(checkpoint, requests, alone):
    with MoEEngine(checkpoint, **BASE) as engine:
        for request, ((token_ids, text, reason), _) in zip(
            zip(*requests, strict=True), alone, strict=True
        ):
            pieces = [chunk.outputs[0] for chunk in engine.stream(*request)]
            assert "".join(piece.text for piece in pieces) == text
            assert sum((piece.token_ids for piece in pieces), ()) == token_ids
            assert pieces[-1].finish_reason == reason
            assert all(piece.finish_reason is None for piece in pieces[:-1])


def test_n_completions_differ_and_repeat_with_the_seed(checkpoint, requests):
    params = SamplingParams(n=4, seed=11, max_tokens=16, ignore_eos=True)
    with MoEEngine(checkpoint, **BASE) as engine:
        [first] = engine.generate(requests[0][0], params)
        [second] = engine.generate(requests[0][0], params)
    texts = [output.token_ids for output in first.outputs]
    assert len(set(texts)) == 4
    assert [output.index for output in first.outputs] == [0, 1, 2, 3]
    assert texts == [output.token_ids for output in second.outputs]
    assert first.usage.completion_tokens == 64
