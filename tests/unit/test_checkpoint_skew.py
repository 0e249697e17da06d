"""Dummy routers can be made to prefer some experts."""

import pytest
import torch

from moe_engine.checkpoint import WeightSpec, fill_dummy
from moe_engine.checkpoint.skew import MAX_POPULARITY, skew_routers, zipf_popularity
from moe_engine.errors import ConfigError

ROUTER = "model.layers.3.mlp.gate.weight"


def router(exponent, *, name=ROUTER, seed=0, num_experts=128, hidden=256, top_k=8):
    target = torch.empty(num_experts, hidden)
    specs = [WeightSpec(name, (slice(0, num_experts), slice(0, hidden)), target)]
    fill_dummy(specs, seed)
    skew_routers(specs, top_k, exponent, seed)
    return target


def measured_popularity(weight, top_k):
    chosen = (torch.randn(20000, weight.shape[1]) @ weight.T).topk(top_k, dim=1).indices
    return torch.bincount(chosen.flatten(), minlength=weight.shape[0]) / 20000


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (16, 4), (8, 1)])
def test_popularity_is_a_zipf_law_cut_off(num_experts, top_k, exponent):
    shares = zipf_popularity(num_experts, top_k, exponent)
    assert sum(shares) == pytest.approx(top_k)
    assert shares == sorted(shares, reverse=True)
    free = [(rank, p) for rank, p in enumerate(shares, 1) if p < MAX_POPULARITY]
    constants = [p * rank**exponent for rank, p in free]
    assert constants == pytest.approx([constants[0]] * len(constants))


def test_too_many_experts_per_token_are_refused():
    with pytest.raises(ConfigError, match="not 2 of 4"):
        zipf_popularity(4, 2, 1.0)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_experts_are_chosen_as_often_as_the_law_says(exponent):
    torch.manual_seed(0)
    wanted = torch.tensor(zipf_popularity(128, 8, exponent))
    measured = measured_popularity(router(exponent), 8).sort(descending=True).values
    # The threshold is not quite constant, and the rows differ in length.
    assert (measured - wanted).abs().sum() / 8 < 0.15
    assert measured[:8].sum() == pytest.approx(wanted[:8].sum().item(), rel=0.1)


def test_an_even_law_changes_nothing():
    target = torch.empty(128, 256)
    fill_dummy([WeightSpec(ROUTER, (slice(0, 128), slice(0, 256)), target)], 0)
    torch.testing.assert_close(router(0.0), target)


def test_the_popular_experts_depend_on_layer_and_seed_alone():
    torch.manual_seed(0)
    top = [
        measured_popularity(weight, 8).topk(5).indices.tolist()
        for weight in (router(1.0), router(1.0), router(1.0, seed=1))
    ]
    assert set(top[0]) == set(top[1]) != set(top[2])
    assert not torch.equal(router(1.0), router(1.0, name=ROUTER.replace("3", "4")))


def test_other_weights_are_left_alone():
    specs = [
        WeightSpec("model.layers.0.mlp.gate_proj.weight", (slice(0, 8),) * 2, torch.ones(8, 8))
    ]
    skew_routers(specs, 1, 1.0, 0)
    assert (specs[0].target == 1).all()
