"""A product that is added to the residual stream in place, seen on a CPU, which never does it."""

import random

import pytest
import torch

from moe_engine.checkpoint.dummy import fill_dummy
from moe_engine.ops import linear
from moe_engine.ops.linear import MANY_ROWS, AddedOutput, adds_in_place, linear_onto
from tests.unit.runner_world import ALL_KINDS, RunnerWorld, mixed_requests


class OnGpu:
    """As much of a tensor as the choice looks at."""

    def __init__(self, num_rows, dtype, is_cuda=True):
        self.num_rows, self.dtype, self.is_cuda = num_rows, dtype, is_cuda

    def __len__(self):
        return self.num_rows


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (OnGpu(MANY_ROWS - 1, torch.bfloat16), False),
        (OnGpu(MANY_ROWS, torch.bfloat16), False),
        (OnGpu(MANY_ROWS + 1, torch.bfloat16), True),
        (OnGpu(MANY_ROWS + 1, torch.float16), True),
        (OnGpu(MANY_ROWS + 1, torch.float32), False),
        (OnGpu(MANY_ROWS + 1, torch.bfloat16, is_cuda=False), False),
    ],
)
def test_many_rows_on_a_gpu_are_added_in_place(x, expected):
    assert adds_in_place(x) == expected


@pytest.mark.parametrize("num_rows", [1, MANY_ROWS, MANY_ROWS + 1])
def test_a_cpu_multiplies_as_ever(num_rows):
    x, weight, residual = torch.randn(num_rows, 6), torch.randn(4, 6), torch.randn(num_rows, 4)
    before = residual.clone()
    assert torch.equal(linear_onto(x, weight, residual), linear.linear(x, weight))
    assert torch.equal(residual, before)


@pytest.fixture
def in_place(monkeypatch):
    """Adds in place for any rows; the numbers of rows it was asked for."""
    asked = []
    monkeypatch.setattr(linear, "adds_in_place", lambda x: asked.append(len(x)) or True)
    return asked


def test_the_residual_stream_gets_the_product(in_place):
    x, weight, residual = torch.randn(7, 6), torch.randn(4, 6), torch.randn(7, 4)
    expected = residual + x @ weight.t()
    added = linear_onto(x, weight, residual)
    assert isinstance(added, AddedOutput)
    assert added.stream_TO.data_ptr() == residual.data_ptr()
    torch.testing.assert_close(added.stream_TO, expected)


def tokens_of(directory, model):
    """What mixed steps make, with weights so large that every layer counts."""
    world = RunnerWorld(directory, model=model, max_prefill_chunk=7)
    fill_dummy(world.runner._model.weight_specs(), seed=1, std=0.3)
    return [
        output[0] for output in world.run(mixed_requests(random.Random(1), 12, kinds=ALL_KINDS))
    ]


@pytest.mark.parametrize(
    ("model", "adds"),
    [
        ({}, True),
        ({"num_hidden_layers": 1}, True),
        ({"num_hidden_layers": 3, "mlp_only_layers": [1]}, True),
        ({"attention_bias": True}, False),
    ],
)
def test_layers_take_a_stream_that_has_their_output_already(tmp_path, request, model, adds):
    """Sparse and dense layers, all rows and those that are needed; a bias is added by itself."""
    (tmp_path / "apart").mkdir()
    (tmp_path / "added").mkdir()
    expected = tokens_of(tmp_path / "apart", model)
    asked = request.getfixturevalue("in_place")
    assert tokens_of(tmp_path / "added", model) == expected
    assert bool(asked) == adds
