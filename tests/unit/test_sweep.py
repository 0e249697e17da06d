"""The steps that show the compiler every kernel: all sizes that matter, and nothing left behind."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_engine.engine.decode import DecodeStep
from moe_engine.engine.graphs import graph_buckets
from moe_engine.engine.sweep import (
    StepSweep,
    compositions,
    doubling_sizes,
    fine_sizes,
    step_batch,
)
from moe_engine.layers.moe import SparseMoE
from moe_engine.ops import tuning
from tests.unit.runner_world import RunnerWorld

CPU = torch.device("cpu")
# The committed choices for projections, and those for shapes that no table has.
LINEAR_CHOICES = [
    *(
        chosen
        for path in sorted(tuning.FOLDER.glob("*.json"))
        for chosen in tuning.parse_document(tuning.read_document(path), path).values()
        if isinstance(chosen, tuning.LinearChoices)
    ),
    *(tuning.LinearChoices.default(depth, 1024) for depth in (512, 2048, 4096, 16384)),
]


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])],
)
def test_sizes_double_up_to_the_largest(largest, sizes):
    assert doubling_sizes(largest) == sizes


@given(st.integers(1, 5000), st.integers(1, 600))
def test_every_power_of_two_up_to_which_there_is_a_size_is_met(largest, size):
    """A variant for sizes in (n, 2 * n] is met by a size of the sweep if any size has it."""
    size = min(size, largest)
    upper = 1 << (size - 1).bit_length()
    assert any(upper // 2 < swept <= upper for swept in doubling_sizes(largest))


@pytest.mark.parametrize("largest", [1, 18, 33, 100, 256, 1000])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("linear", LINEAR_CHOICES)
@pytest.mark.parametrize("with_cuda", [True, False])
def test_whatever_meets_where_all_decode_meets_in_a_fine_size(
    largest, num_kv_heads, linear, with_cuda
):
    """A parted projection and its attention's launch are one variant of the decode kernel."""
    decode_launch = pytest.importorskip("moe_engine.kernels.paged_decode_table").decode_launch
    on_hopper = tuning.DecodeChoices().launches

    def variant(num_rows):
        num_pairs = num_rows * num_kv_heads
        if with_cuda and tuning.pick(on_hopper, num_pairs) is not None:
            return None
        return tuning.pick(linear.kernels, num_rows), decode_launch(num_pairs)

    met = {variant(num_rows) for num_rows in fine_sizes(largest)}
    assert met == {variant(num_rows) for num_rows in range(1, largest + 1)}


@given(st.integers(1, 300), st.integers(1, 40))
def test_compositions_are_steps_of_the_size_with_enough_sequences(num_tokens, max_num_seqs):
    steps = compositions(num_tokens, max_num_seqs)
    for num_decodes, span_lens in steps:
        assert num_decodes + sum(span_lens) == num_tokens
        assert 1 <= num_decodes + len(span_lens) <= max_num_seqs
        assert all(length >= 2 for length in span_lens)
    if num_tokens >= 2:
        assert (0, min(num_tokens // 2, max_num_seqs)) in [(n, len(lens)) for n, lens in steps]
    assert all(span_lens for _, span_lens in steps)
    assert len(steps) == len({num_decodes for num_decodes, _ in steps})
    for fewest in {1, min(num_tokens, max_num_seqs) // 2}:
        if num_tokens >= fewest + 2 and max_num_seqs > fewest:
            assert any(num_decodes == fewest and span_lens for num_decodes, span_lens in steps)


def test_batch_of_a_composition():
    batch = step_batch(2, [3, 2], 4, CPU)
    assert batch.num_tokens == 7
    assert batch.context_lens_S.tolist() == [1, 1, 4, 3]
    assert batch.query_starts_S.tolist() == [0, 1, 2, 5, 7]
    assert [(s.first_row, s.query_len, s.context_len) for s in batch.prefills] == [
        (2, 3, 4),
        (5, 2, 3),
    ]
    assert batch.block_tables_SB.shape == (4, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 2),
        ({"num_hidden_layers": 1}, 1),
        ({"num_hidden_layers": 6, "decoder_sparse_step": 2}, 4),  # the last one is sparse
        ({"num_hidden_layers": 5, "decoder_sparse_step": 2}, 3),
        ({"num_hidden_layers": 6, "mlp_only_layers": [0, 1, 2]}, 5),
        ({"num_hidden_layers": 6, "mlp_only_layers": [5]}, 6),
    ],
)
def test_layers_show_each_kind_and_what_follows_it(tmp_path, options, expected):
    model = RunnerWorld(tmp_path, model=options).runtime._model
    assert len(model.shortened().layers) == len(model.shortened().shortened().layers) == expected


def make_sweep(runtime, *, with_graphs=True):
    return StepSweep(
        runtime.config,
        runtime.model_config,
        runtime._model,
        runtime._kv_cache(1),
        runtime.groups,
        runtime.exchange,
        runtime.max_model_len,
        CPU,
        with_graphs=with_graphs,
    )


@pytest.mark.parametrize("with_graphs", [True, False])
def test_sweep_runs_steps_of_all_sizes_on_the_first_layers(tmp_path, monkeypatch, with_graphs):
    runtime = RunnerWorld(tmp_path, model={"num_hidden_layers": 4}).runtime
    attended, decoded, sampled = set(), set(), set()
    model = runtime._model
    for layer, module in enumerate(model.layers):
        module.self_attn.register_forward_hook(
            lambda _, args, out, layer=layer: attended.add(
                (layer, args[2].batch.num_tokens, args[2].num_tokens_1 is not None)
            )
        )
    monkeypatch.setattr(
        "moe_engine.engine.sweep.sample_tokens",
        lambda logits, params, may_filter: sampled.add((len(logits), logits.dtype, may_filter)),
    )
    monkeypatch.setattr(
        "moe_engine.engine.sweep.greedy_tokens", lambda logits: decoded.add(len(logits))
    )
    with torch.inference_mode():
        make_sweep(runtime, with_graphs=with_graphs)()
    sizes = doubling_sizes(runtime.config.scheduler.max_num_batched_tokens)
    rows = doubling_sizes(runtime.config.scheduler.max_num_seqs)
    max_seqs = runtime.config.scheduler.max_num_seqs
    eager = {*sizes, *fine_sizes(max_seqs)}
    expected = {(layer, size, False) for layer in (0, 1) for size in eager}
    if with_graphs:
        expected |= {(layer, size, True) for layer in (0, 1) for size in graph_buckets(max_seqs)}
    assert attended == expected
    assert sampled == {(size, torch.float32, some) for size in rows for some in (True, False)}
    assert decoded == set(rows)
    assert len(model.layers) == 4


def test_sweep_launches_singly_only_what_no_graph_holds(tmp_path, monkeypatch):
    """And of its smallest step all numbers of decodes, of prompts and of rows that are scored."""
    monkeypatch.setattr("moe_engine.engine.mixed.takes", lambda *_: True)
    monkeypatch.setattr("moe_engine.engine.mixed.MIXED_ROWS", (8, 16))
    world = RunnerWorld(tmp_path, max_num_batched_tokens=70, max_num_seqs=9)
    launched, scored = set(), set()

    def record(sweep, num_decodes, span_lens, num_scored=0):
        launched.add((num_decodes, tuple(span_lens)))
        scored.add((sum(span_lens), num_scored))

    monkeypatch.setattr(StepSweep, "_compute", record)
    with torch.inference_mode():
        make_sweep(world.runtime)()
    sizes = {num_decodes + sum(span_lens) for num_decodes, span_lens in launched}
    assert sizes == {17, 32, 64, 70}
    of_17 = {(n, len(lens)) for n, lens in launched if n + sum(lens) == 17}
    assert of_17 >= {(0, 1), (0, 2), (0, 4), (0, 8), (1, 1), (2, 2), (4, 4), (8, 1)}
    assert scored >= {(17, num_scored) for num_scored in doubling_sizes(17)}
    launched.clear()
    monkeypatch.setattr("moe_engine.engine.mixed.MIXED_ROWS", (128,))
    with torch.inference_mode():
        make_sweep(world.runtime)()
    assert not launched, "all is captured"


@pytest.mark.parametrize("sparse_step", [1, 2])
def test_experts_meet_all_numbers_of_rows_that_may_be_needed(tmp_path, monkeypatch, sparse_step):
    """Of a step that is launched singly, in which the last layer computes few rows."""
    monkeypatch.setattr("moe_engine.engine.mixed.takes", lambda *_: True)
    monkeypatch.setattr("moe_engine.engine.mixed.MIXED_ROWS", (8, 16))
    model = {"num_hidden_layers": 6, "decoder_sparse_step": sparse_step}
    world = RunnerWorld(tmp_path, max_num_batched_tokens=70, max_num_seqs=9, model=model)
    rows = set()
    run_experts = SparseMoE._run_experts

    def record(moe, x_TH, ids_TK, weights_TK, step):
        if step.num_tokens_1 is None:
            rows.add(len(x_TH))
        return run_experts(moe, x_TH, ids_TK, weights_TK, step)

    monkeypatch.setattr(SparseMoE, "_run_experts", record)
    with torch.inference_mode():
        make_sweep(world.runtime)()
    assert rows >= {1, 2, 4, 8, 16, 17, 32, 64, 70}


def test_warming_up_runs_few_layers_and_all_choices(tmp_path, monkeypatch):
    world = RunnerWorld(tmp_path, model={"num_hidden_layers": 5})
    runner = world.runner
    decode = DecodeStep(runner._model, runner._kv, runner._table, runner._groups, 4)
    ran, chosen = [], []
    for layer, module in enumerate(runner._model.layers):
        module.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    monkeypatch.setattr(decode, "choose", lambda rows, logits, choice: chosen.append(choice))
    decode.load([], [])
    with torch.inference_mode():
        decode.warm_up(4, runner._exchange.select(4))
        assert (ran, tuple(chosen)) == ([0, 1], decode.choices)
        ran.clear()
        decode.compute(4, runner._exchange.select(4))
    assert ran == [0, 1, 2, 3, 4]


def test_sweep_leaves_the_model_and_its_outputs_as_they_were(tmp_path):
    world = RunnerWorld(tmp_path, model={"num_hidden_layers": 3})
    before = {name: value.clone() for name, value in world.runtime._model.named_parameters()}
    with torch.inference_mode():
        make_sweep(world.runtime)()
    after = dict(world.runtime._model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
