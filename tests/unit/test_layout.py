"""Every rank has one place, shares are even, and an impossible layout is refused in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_engine.config import ModelConfig, ParallelConfig
from moe_engine.dist.layout import RankLayout, check_layout, split_evenly
from moe_engine.errors import ConfigError

SHAPE = {
    "model_type": "qwen3_moe",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "moe_intermediate_size": 10,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def check(attention_tp: int, attention_dp: int = 1, replicas: int = 1, **shape: object) -> None:
    parallel = ParallelConfig(attention_tp, attention_dp, replicas)
    check_layout(ModelConfig.from_dict(SHAPE | shape), parallel)


def refusal(*layout: int, **shape: object) -> str:
    with pytest.raises(ConfigError) as caught:
        check(*layout, **shape)
    return str(caught.value)


@given(total=st.integers(0, 10_000), parts=st.integers(1, 300))
def test_even_shares_differ_by_one_at_most_and_larger_ones_come_first(total, parts):
    shares = split_evenly(total, parts)
    assert len(shares) == parts
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 3), (4, 1), (2, 3), (4, 2)])
def test_every_rank_has_one_place_among_neighbours(tp, dp):
    layouts = [RankLayout(rank, tp, dp) for rank in range(tp * dp)]
    assert {layout.world_size for layout in layouts} == {tp * dp}
    places = [(layout.dp_rank, layout.tp_rank) for layout in layouts]
    assert places == [(group, place) for group in range(dp) for place in range(tp)]
    for layout in layouts:
        assert layout.group_ranks(layout.dp_rank)[layout.tp_rank] == layout.rank
    covered = [rank for group in range(dp) for rank in layouts[0].group_ranks(group)]
    assert covered == list(range(tp * dp))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ((1, 1), {}),
        ((8, 1), {}),  # two ranks share each KV head
        ((4, 2), {}),
        ((1, 8), {}),
        ((2, 1), {"num_experts": 6, "intermediate_size": 25}),  # no dense layer has that size
        ((8, 1), {"mlp_only_layers": [0, 1, 2], "num_experts": 3}),  # no layer has experts
        ((4, 1), {"mlp_only_layers": [1]}),
        ((3, 1), {"num_attention_heads": 6, "num_key_value_heads": 1, "num_experts": 9}),
    ],
)
def test_a_layout_that_divides_the_model_is_accepted(layout, shape):
    check(*layout, **shape)


def test_attention_heads_must_be_divisible():
    message = refusal(16, num_experts=16)
    assert message == "impossible layout: attention_tp 16 does not divide the 8 attention heads"


def test_kv_heads_are_divided_or_shared_evenly():
    message = refusal(6, num_attention_heads=24, num_key_value_heads=4, num_experts=12)
    assert message == (
        "impossible layout: attention_tp 6 neither divides the 4 KV heads nor is a multiple of them"
    )


def test_experts_must_be_divisible_by_the_world():
    assert refusal(4, 3) == (
        "impossible layout: the world of 12 ranks (attention_tp 4 x attention_dp 3) "
        "does not divide the 8 experts"
    )


def test_dense_layers_must_be_divisible():
    message = refusal(2, intermediate_size=25, mlp_only_layers=[1])
    assert message == (
        "impossible layout: attention_tp 2 does not divide the dense intermediate size 25"
    )


def test_replicas_are_engines_of_their_own():
    message = refusal(2, 1, 3)
    assert "replicas is 3" in message
    assert "set replicas to 1" in message


def test_every_problem_is_named_at_once():
    message = refusal(5, 3, 2, mlp_only_layers=[0])
    for part in (
        "5 does not divide the 8 attention heads",
        "5 neither divides the 4 KV heads",
        "15 ranks (attention_tp 5 x attention_dp 3) does not divide the 8 experts",
        "5 does not divide the dense intermediate size 24",
        "replicas is 2",
    ):
        assert part in message
