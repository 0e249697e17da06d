"""Dummy weights are one random model per seed, whatever the layout."""

import pytest
import torch

from moe_engine.checkpoint import WeightSpec, fill_dummy
from moe_engine.checkpoint.dummy import fill_uniform
from moe_engine.config import ModelConfig
from tests.unit.checkpoint_factory import TINY, whole_specs

CONFIG = ModelConfig.from_dict({"model_type": "qwen3_moe", "attention_bias": True, **TINY})
NAME = "model.layers.0.mlp.experts.1.up_proj.weight"


def filled(seed=0, name=NAME, shape=(300, 200), std=0.02, dtype=torch.float32):
    target = torch.empty(shape, dtype=dtype)
    fill_dummy([WeightSpec(name, tuple(slice(0, n) for n in shape), target)], seed, std)
    return target


def test_the_same_seed_is_the_same_model():
    first, second = whole_specs(CONFIG), whole_specs(CONFIG)
    fill_dummy(first, seed=5)
    fill_dummy(reversed(second), seed=5)
    assert all(torch.equal(a.target, b.target) for a, b in zip(first, second, strict=True))


def test_seed_and_name_change_every_value():
    base = filled()
    assert (base != filled(seed=1)).float().mean() > 0.999
    assert (base != filled(name=NAME.replace("up", "gate"))).float().mean() > 0.999


def test_a_slice_holds_what_the_whole_tensor_has_there():
    whole = filled()
    for slices in [(slice(100, 200), slice(0, 200)), (slice(0, 300), slice(50, 53))]:
        target = torch.empty(whole[slices].shape)
        fill_dummy([WeightSpec(NAME, slices, target)], 0)
        assert torch.equal(target, whole[slices])


def test_chunks_do_not_show(monkeypatch):
    whole = filled()
    monkeypatch.setattr("moe_engine.ops.reference.fill._CHUNK_ELEMENTS", 450)
    assert torch.equal(filled(), whole)


def test_values_are_uniform_with_the_deviation_asked_for():
    values = filled(std=0.5).flatten() / 0.5
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1.0) < 0.01
    assert values.abs().max() < 3**0.5
    # a uniform distribution fills ten equal bins equally
    counts = torch.histc(values, bins=10, min=-(3**0.5), max=3**0.5)
    assert counts.min() > 5600
    assert counts.max() < 6400


def test_neighbours_are_independent():
    values = filled(std=1.0)
    assert abs((values[1:] * values[:-1]).mean()) < 0.02
    assert abs((values[:, 1:] * values[:, :-1]).mean()) < 0.02
    assert len(values.unique()) > 0.98 * values.numel()


def test_values_are_the_same_on_every_machine():
    target = torch.empty(2, 3)
    fill_uniform(target, seed=7, name="x", starts=(5, 1), std=1.0)
    expected = [
        [-0.5767201781272888, -1.2722467184066772, -1.3241569995880127],
        [0.2824237644672394, 0.7802176475524902, 0.9138645529747009],
    ]
    assert target.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_from_float32(dtype):
    assert torch.equal(filled(dtype=dtype), filled().to(dtype))


def test_norm_weights_are_one_and_biases_are_small():
    specs = whole_specs(CONFIG)
    fill_dummy(specs, seed=0)
    for spec in specs:
        if spec.name.endswith("norm.weight"):
            assert (spec.target == 1.0).all(), spec.name
        else:
            assert 0 < spec.target.abs().max() < 0.02 * 3**0.5, spec.name


def test_empty_targets_are_left_alone():
    filled(shape=(0, 5))
    filled(shape=(5, 0))
