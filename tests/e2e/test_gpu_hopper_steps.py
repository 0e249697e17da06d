"""Steps on a GPU that run by the kernels for Hopper: graphs, overlap, preemption.

The other steps are in `test_gpu_steps`. These are in bfloat16, in which a request may get other
bits beside others than alone. But two runs of the same steps give the same bits, whether their
kernels are replayed or launched one by one, and whether a step waits for the one before it.

Every test says which kernels it is about, and fails if they were not taken.
"""

import pytest

from tests.e2e.hopper_world import (
    HOPPER_LIMITS,
    LAUNCHES,
    PREFILL_KERNELS,
    hopper_world,
    record_kernels,
    requests_with_long_prompts,
)
from tests.e2e.test_gpu_steps import (
    alone,
    assert_same_or_tied,
    check_logits_survive_until_the_next_graph_runs,
    check_result_waits_for_its_own_step_only,
    greedy,
    launch_counting,
    prompts_of,
)
from tests.unit.runner_world import ALL_KINDS, DRAWN_KINDS, GREEDY_KINDS

pytestmark = pytest.mark.usefixtures("needs_hopper")

PLAIN_KINDS = (*DRAWN_KINDS, GREEDY_KINDS[0], {"temperature": 0.6, "top_k": 20, "top_p": 0.95})
# Every token goes to every expert, so that rounding cannot swap any.
DENSE = {"num_experts": 8}


@pytest.fixture(scope="module")
def kernels():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield record_kernels(monkeypatch)


def start_graphs(kernels, directory, **options):
    """A world whose graphs hold all kernels for Hopper; what it launches is recorded from here."""
    kernels.captured.clear()
    world = hopper_world(directory, **options)
    assert world.runtime.uses_graphs
    assert kernels.captured == LAUNCHES.keys()
    kernels.launched.clear()
    return world


@pytest.fixture(scope="module")
def graphs(kernels, tmp_path_factory):
    return start_graphs(kernels, tmp_path_factory.mktemp("graphs"), pipeline_depth=2)


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """The same steps, with every kernel launched by itself and one step at a time."""
    options = {"cuda_graphs": False, "with_decode_steps": True, "pipeline_depth": 1}
    options["mixed_sizes"] = []
    return hopper_world(tmp_path_factory.mktemp("launches"), **options)


@pytest.fixture(scope="module")
def scarce_graphs(kernels, tmp_path_factory):
    """Blocks for a part of the requests, and experts that rounding cannot swap."""
    return start_graphs(kernels, tmp_path_factory.mktemp("scarce"), model=DENSE, num_blocks=200)


def check_same_bits(kernels, world, launches, requests):
    """Returns the sizes of the graphs that were replayed, and of those that drew."""
    kernels.launched.clear()
    outputs = world.run(requests)
    assert not kernels.launched, "some step was no graph"
    sizes, mixed_sizes = launches.runner._graphs, launches.runner._mixed_graphs.sizes_run
    num_run, num_drawn, num_mixed = len(sizes.sizes_run), len(sizes.sizes_drawn), len(mixed_sizes)
    expected = launches.run(requests)
    assert kernels.launched >= PREFILL_KERNELS | {"grouped experts"}
    assert world.steps == launches.steps
    assert len(set(mixed_sizes[num_mixed:])) > 1
    for number, (output, other) in enumerate(zip(outputs, expected, strict=True)):
        assert output == other, f"request {number}"
    return set(sizes.sizes_run[num_run:]), set(sizes.sizes_drawn[num_drawn:])


def assert_all_kernels_of_decode_steps(sizes):
    """Batches for each of the kernels that only a few rows, or not so few, go to."""
    assert sizes & {1, 2}
    assert sizes & {8, 16}
    assert 24 in sizes


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_graphs_and_overlap_give_the_bits_of_single_launches(kernels, graphs, launches, seed):
    """Long and short prompts, whole and in chunks, share steps; decodes go through the graphs."""
    requests = requests_with_long_prompts(seed, kinds=ALL_KINDS)
    sizes_run, _ = check_same_bits(kernels, graphs, launches, requests)
    assert_all_kernels_of_decode_steps(sizes_run)


@pytest.mark.parametrize("seed", [1, 2, 11])
def test_tokens_drawn_in_graphs_are_those_of_single_launches(kernels, graphs, launches, seed):
    requests = requests_with_long_prompts(seed, kinds=PLAIN_KINDS)
    _, sizes_drawn = check_same_bits(kernels, graphs, launches, requests)
    assert_all_kernels_of_decode_steps(sizes_drawn)


def test_graphs_that_wait_for_each_other_give_the_same_bits(tmp_path, kernels, launches):
    world = start_graphs(kernels, tmp_path, pipeline_depth=1)
    for seed, kinds in ((7, ALL_KINDS), (8, PLAIN_KINDS)):
        requests = requests_with_long_prompts(seed, kinds=kinds)
        check_same_bits(kernels, world, launches, requests)


def test_preempted_requests_go_on_where_they_were(kernels, scarce_graphs):
    """Among them the longest, which is computed anew."""
    made = requests_with_long_prompts(9, long_prompts={0: 1100, 20: 1300})
    requests = [(prompt, greedy(60, logprobs=2)) for prompt, _ in made]
    before = scarce_graphs.scheduler.stats().num_preemptions_total
    kernels.launched.clear()
    outputs = scarce_graphs.run(requests)
    assert not kernels.launched
    assert scarce_graphs.scheduler.stats().num_preemptions_total > before
    # Its prompt and what it had said.
    assert max(num_tokens for step in scarce_graphs.steps for _, num_tokens in step) > 1300
    for output, other in zip(outputs, alone(scarce_graphs, requests), strict=True):
        assert_same_or_tied(output, other)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 16, 17, 24])
def test_batch_of_any_size_gives_what_each_request_gives_alone(scarce_graphs, size):
    requests = [(prompt, greedy(16, logprobs=2)) for prompt in prompts_of(size, size)]
    together = scarce_graphs.run(requests)
    assert {len(step) for step in scarce_graphs.steps} == {size}
    for output, other in zip(together, alone(scarce_graphs, requests), strict=True):
        assert_same_or_tied(output, other)


def test_requests_share_what_their_own_step_computes(tmp_path, kernels, scarce_graphs):
    """All but the last token of the first one's prompt are in its full blocks."""
    world = hopper_world(tmp_path, model=DENSE, prefix_cache=True)
    length = 12 * HOPPER_LIMITS["block_size"] + 1
    prompt = [token for (token,) in prompts_of(length, 1, longest=1)]
    requests = [(prompt, greedy(16, logprobs=2))] * 6
    kernels.launched.clear()
    together = world.run(requests)
    assert not kernels.launched
    assert sorted(num_tokens for _, num_tokens in world.steps[0]) == [*[1] * 5, length]
    (expected,) = alone(scarce_graphs, requests[:1])
    for output in together:
        assert_same_or_tied(output, expected)


def test_logits_of_one_graph_survive_until_the_next_runs(graphs):
    check_logits_survive_until_the_next_graph_runs(graphs)


def test_result_waits_for_its_own_step_only(graphs):
    check_result_waits_for_its_own_step_only(graphs)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_no_step_waits_for_the_device(tmp_path, kernels, cuda_graphs):
    world = hopper_world(tmp_path, cuda_graphs=cuda_graphs, pipeline_depth=2)
    kernels.launched.clear()
    requests = requests_with_long_prompts(1, kinds=ALL_KINDS)
    assert launch_counting(world, requests) == {"decode", "mixed"}
    assert kernels.launched == (set() if cuda_graphs else LAUNCHES.keys())
