"""Steps on a GPU: graphs, overlap and memory change nothing but the speed.

The runner is driven in this process, so that a run costs no start of ranks. Everything is compared
with the plainest way to run: one request at a time, no graphs, one step at a time.

Steps of a model so small that the kernels for Hopper do not take it are tested here, in float32
too; `test_gpu_hopper_steps` has those that run by these kernels.
"""

import gc
import itertools
import os
import random

import pytest
import torch

from moe_engine import SamplingParams
from moe_engine.config.engine import GIB
from moe_engine.engine.decode import Choice, DecodeStep
from moe_engine.types.messages import AddRequest
from tests.unit.runner_world import (
    DRAWN_KINDS,
    GREEDY_KINDS,
    KINDS_OF_CHOICES,
    RunnerWorld,
    mixed_requests,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

GPU = {"device": "cuda", "prefix_cache": False}
CLOSE = 0.1
"""In bfloat16, tokens whose log-probabilities differ by less may change places between batches
of different sizes, for which the matrix kernels add up in different orders."""


def greedy(num_tokens, **others):
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, **others)


def prompts_of(number, seed, longest=20):
    choose = random.Random(seed)
    lengths = [choose.randint(1, longest) for _ in range(number)]
    return [[choose.randrange(90) for _ in range(length)] for length in lengths]


def assert_same_or_tied(found, expected):
    """Equal tokens up to the first place where two were all but equally likely."""
    (tokens, logprobs, _), (others, other_logprobs, _) = found, expected
    for position, (token, other) in enumerate(zip(tokens, others, strict=True)):
        if token == other:
            assert logprobs[position].logprob == pytest.approx(
                other_logprobs[position].logprob, abs=CLOSE
            )
            continue
        tops = other_logprobs[position].top_logprobs
        assert tops[0] - tops[1] < CLOSE, f"position {position}: {token} is not {other}"
        return


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One request at a time, every kernel launched by itself."""
    options = {"cuda_graphs": False, "pipeline_depth": 1, "dtype": "float32", **GPU}
    return RunnerWorld(tmp_path_factory.mktemp("plain"), **options)


def alone(world, requests):
    return [world.run([request])[0] for request in requests]


def assert_same_tokens(found, expected):
    for number, (output, other) in enumerate(zip(found, expected, strict=True)):
        assert output[0] == other[0], f"request {number}"
        for some, others in zip(output[1:], other[1:], strict=True):
            assert [entry.logprob for entry in some] == pytest.approx(
                [entry.logprob for entry in others], abs=1e-3
            )


@pytest.mark.parametrize(
    ("cuda_graphs", "depth", "chunk"),
    [(True, 1, None), (True, 2, None), (True, 2, 5), (False, 2, None), (False, 1, 5)],
)
def test_mixed_steps_of_all_kinds_of_requests(tmp_path, plain, cuda_graphs, depth, chunk):
    """Chunks of prompts share steps with decodes; decodes alone go through the graphs."""
    requests = mixed_requests(random.Random(chunk), 24)
    options = {"cuda_graphs": cuda_graphs, "pipeline_depth": depth, "max_prefill_chunk": chunk}
    world = RunnerWorld(tmp_path, dtype="float32", **GPU, **options)
    assert world.runtime.uses_graphs == cuda_graphs
    assert_same_tokens(world.run(requests), alone(plain, requests))


@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_are_drawn_in_graphs(tmp_path, plain, depth):
    """Nobody's logits are changed, so steps in which all decode have graphs that choose, too."""
    kinds = (*DRAWN_KINDS, GREEDY_KINDS[0], {"temperature": 0.6, "top_k": 20, "top_p": 0.95})
    requests = mixed_requests(random.Random(7), 24, kinds=kinds)
    world = RunnerWorld(tmp_path, dtype="float32", pipeline_depth=depth, **GPU)
    graphs = world.runner._graphs
    assert set(graphs._choice_graphs) == set(itertools.product(graphs.buckets, Choice))
    assert_same_tokens(world.run(requests), alone(plain, requests))


@pytest.mark.parametrize("choice", Choice)
def test_each_choice_has_a_graph_that_takes_the_right_tokens(tmp_path, plain, choice):
    requests = mixed_requests(random.Random(8), 24, kinds=KINDS_OF_CHOICES[choice])
    world = RunnerWorld(tmp_path, dtype="float32", **GPU)
    choose, chosen = world.runner._graphs.choose, set()

    def choose_and_record(size, choice):
        chosen.add(choice)
        choose(size, choice)

    world.runner._graphs.choose = choose_and_record
    assert_same_tokens(world.run(requests), alone(plain, requests))
    assert chosen == {choice}


def test_preempted_requests_go_on_where_they_were(tmp_path, plain):
    requests = mixed_requests(random.Random(1), 20)
    world = RunnerWorld(tmp_path, dtype="float32", num_blocks=16, **GPU)
    assert_same_tokens(world.run(requests), alone(plain, requests))
    assert world.scheduler.stats().num_preemptions_total > 0


@pytest.fixture(scope="module")
def float32_graphs(tmp_path_factory):
    return RunnerWorld(tmp_path_factory.mktemp("float32"), dtype="float32", **GPU)


@pytest.fixture(scope="module")
def bfloat16_graphs(tmp_path_factory):
    return RunnerWorld(tmp_path_factory.mktemp("bfloat16"), dtype="bfloat16", **GPU)


@pytest.mark.parametrize("size", range(1, 10))
def test_batch_of_any_size_gives_what_each_request_gives_alone(float32_graphs, plain, size):
    requests = [(prompt, greedy(16)) for prompt in prompts_of(size, size)]
    assert_same_tokens(float32_graphs.run(requests), alone(plain, requests))


@pytest.mark.parametrize("size", range(1, 10))
def test_batch_of_any_size_in_bfloat16(bfloat16_graphs, size):
    requests = [(prompt, greedy(16, logprobs=2)) for prompt in prompts_of(size, size)]
    together = bfloat16_graphs.run(requests)
    for output, other in zip(together, alone(bfloat16_graphs, requests), strict=True):
        assert_same_or_tied(output, other)


def test_graphs_without_padding_give_what_single_launches_give(tmp_path, bfloat16_graphs):
    """Prompts so short that one step computes them all, and all decode together from then on."""
    world = RunnerWorld(tmp_path, dtype="bfloat16", cuda_graphs=False, **GPU)
    for size in (1, 2, 4, 8, 9):
        prompts = prompts_of(size, 50 + size, longest=3)
        requests = [(prompt, greedy(12, logprobs=2)) for prompt in prompts]
        for output, other in zip(bfloat16_graphs.run(requests), world.run(requests), strict=True):
            assert_same_or_tied(output, other)


def check_logits_survive_until_the_next_graph_runs(world):
    runner = world.runner
    decode = runner._decode
    assert isinstance(decode, DecodeStep)
    for size in reversed(runner._graphs.buckets):
        with torch.inference_mode():
            decode.load([], [])
            replayed = runner._graphs.replay(size).clone()
            computed = decode.compute(size, runner._exchange.select(size))
        assert replayed.shape == computed.shape == (size, 97)
        assert torch.equal(replayed, computed)


def test_logits_of_one_graph_survive_until_the_next_runs(bfloat16_graphs):
    """Graphs share memory: a sampled batch right after a greedy one of another size."""
    check_logits_survive_until_the_next_graph_runs(bfloat16_graphs)


def launch_counting(world, requests):
    """Run requests with PyTorch told to raise where the host would wait for the device."""
    for number, (prompt, params) in enumerate(requests):
        world.scheduler.add(AddRequest(str(number), prompt, params))
    kinds = set()
    pending = None
    while world.scheduler.has_unfinished or pending is not None:
        plan = world.scheduler.schedule()
        launched = None
        if plan is not None:
            steps = plan.groups[0].steps
            kinds.add("decode" if all(step.num_tokens == 1 for step in steps) else "mixed")
            torch.cuda.set_sync_debug_mode("error")
            try:
                launched = world.runner.launch(plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if pending is not None:
            world.scheduler.complete([pending.result()])
        pending = launched
    return kinds


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_no_step_waits_for_the_device(tmp_path, cuda_graphs):
    """bfloat16, for which all operations have kernels; every kind of sampling and scoring."""
    options = {"max_prefill_chunk": 7, "cuda_graphs": cuda_graphs, "pipeline_depth": 2}
    world = RunnerWorld(tmp_path, dtype="bfloat16", **GPU, **options)
    requests = mixed_requests(random.Random(4), 12)
    assert launch_counting(world, requests) == {"decode", "mixed"}


def check_result_waits_for_its_own_step_only(world):
    world.scheduler.add(AddRequest("a", [1, 2, 3], greedy(1)))
    pending = world.runner.launch(world.scheduler.schedule())
    torch.cuda._sleep(2_000_000_000)  # a second or so
    busy = torch.cuda.Event()
    busy.record()
    world.scheduler.complete([pending.result()])
    assert not busy.query()
    torch.cuda.synchronize()


def test_result_waits_for_its_own_step_only(bfloat16_graphs):
    """While the device is busy with something later, an earlier result can be had."""
    check_result_waits_for_its_own_step_only(bfloat16_graphs)


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="needs the GPU for itself")
def test_memory_is_where_the_ledger_says(tmp_path):
    """A vocabulary of real size, so that activations and graphs are seen."""
    gc.collect()
    torch.cuda.empty_cache()
    model = {"vocab_size": 50_000, "hidden_size": 512, "num_attention_heads": 8, "head_dim": 64}
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 1024, "num_blocks": 2048}
    world = RunnerWorld(tmp_path, model=model, dtype="bfloat16", **GPU | limits)
    ledger = world.runtime.ledger
    _, total = torch.cuda.mem_get_info()
    assert ledger.total == total
    assert ledger.activations > 0
    assert 0 < ledger.graphs <= ledger.graphs_reserved
    parts = ledger.at_start + ledger.weights + ledger.kv_cache + ledger.graphs
    assert parts <= total - ledger.free
    assert total - ledger.free - parts < 2 * GIB  # libraries and compiled kernels
    params = SamplingParams(max_tokens=10, ignore_eos=True, top_p=0.9, top_k=50, logprobs=5)
    world.run([(list(range(10, 50)), params)] * 64)
    free, _ = torch.cuda.mem_get_info()
    assert ledger.free - free <= ledger.activations + GIB // 4
