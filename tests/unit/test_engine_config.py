"""Every option of the engine and the server refuses values that cannot work, naming the limit."""

import math

import pytest

from moe_engine.config import (
    CacheConfig,
    ClusterConfig,
    EngineConfig,
    ExchangeConfig,
    ParallelConfig,
    SchedulerConfig,
    ServerConfig,
)
from moe_engine.errors import ConfigError

LEAST = [
    (ParallelConfig, "attention_tp", 1),
    (ParallelConfig, "attention_dp", 1),
    (ParallelConfig, "replicas", 1),
    (ClusterConfig, "nodes", 1),
    (ClusterConfig, "gpus_per_node", 1),
    (CacheConfig, "block_size", 1),
    (CacheConfig, "num_blocks", 1),
    (CacheConfig, "kv_cache_memory", 1),
    (SchedulerConfig, "max_model_len", 1),
    (SchedulerConfig, "max_num_seqs", 1),
    (SchedulerConfig, "max_prefill_chunk", 1),
    (SchedulerConfig, "max_waiting", 1),
    (ExchangeConfig, "replicated_max_tokens", 0),
    (ServerConfig, "max_body_bytes", 1),
]
CHOICES = [
    (ExchangeConfig, "exchange"),
    (EngineConfig, "load_format"),
    (EngineConfig, "dtype"),
    (EngineConfig, "device"),
    (ServerConfig, "log_level"),
]


def refusal(config, **values) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**values)
    return str(caught.value)


@pytest.mark.parametrize(("config", "name", "least"), LEAST)
def test_counts_have_a_least_value(config, name, least):
    assert getattr(config(**{name: least}), name) == least
    for value in (least - 1, -(10**9)):
        assert refusal(config, **{name: value}) == (
            f"{name} is {value}; it must be at least {least}"
        )


@pytest.mark.parametrize(("config", "name"), CHOICES)
def test_choices_are_listed_when_another_value_is_given(config, name):
    choices = config.__dataclass_fields__[name].metadata["choices"]
    for value in choices:
        assert getattr(config(**{name: value}), name) == value
    assert refusal(config, **{name: "other"}) == (
        f"{name} is 'other'; it must be one of {', '.join(choices)}"
    )


@pytest.mark.parametrize("share", [0.0, -0.1, 1.001, math.nan, math.inf])
def test_memory_utilization_is_a_share(share):
    CacheConfig(memory_utilization=1.0)
    message = refusal(CacheConfig, memory_utilization=share)
    assert message == f"memory_utilization is {share}; it is in (0, 1]"


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_startup_timeout_is_positive(seconds):
    message = refusal(EngineConfig, startup_timeout=seconds)
    assert message == f"startup_timeout is {seconds}; it must be positive"


@pytest.mark.parametrize("depth", [0, 3])
def test_one_or_two_steps_may_be_under_way(depth):
    assert [SchedulerConfig(pipeline_depth=d).pipeline_depth for d in (None, 1, 2)] == [None, 1, 2]
    message = refusal(SchedulerConfig, pipeline_depth=depth)
    assert message == f"pipeline_depth is {depth}; it must be 1 or 2"


def test_every_running_sequence_can_decode_in_one_step():
    SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=8)
    message = refusal(SchedulerConfig, max_num_seqs=8, max_num_batched_tokens=7)
    assert "max_num_batched_tokens is 7; it must be at least max_num_seqs = 8" in message


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_is_a_port(port):
    assert [ServerConfig(port=p).port for p in (0, 65535)] == [0, 65535]
    assert refusal(ServerConfig, port=port) == f"port is {port}; it must be in [0, 65535]"


def test_the_layout_must_fit_the_cluster():
    parallel = ParallelConfig(attention_tp=4, attention_dp=2, replicas=2)
    assert parallel.world_size == 8
    EngineConfig(parallel=parallel, cluster=ClusterConfig(nodes=2, gpus_per_node=8))
    EngineConfig(parallel=parallel, cluster=ClusterConfig(nodes=1))  # asks the machine
    message = refusal(
        EngineConfig, parallel=parallel, cluster=ClusterConfig(nodes=3, gpus_per_node=5)
    )
    assert message == (
        "the layout needs 16 ranks (attention_tp 4 x attention_dp 2 x replicas 2) "
        "but the cluster has 15 GPUs (3 nodes x 5)"
    )


@pytest.mark.parametrize(("exchange", "tp", "dp"), [("local", 2, 1), ("replicated", 2, 3)])
def test_exchange_that_the_layout_forbids_is_refused(exchange: str, tp: int, dp: int) -> None:
    with pytest.raises(ConfigError, match=f"'{exchange}'.*attention_tp {tp} x attention_dp {dp}"):
        EngineConfig(exchange=ExchangeConfig(exchange=exchange), parallel=ParallelConfig(tp, dp))


@pytest.mark.parametrize(("exchange", "tp", "dp"), [("local", 1, 1), ("replicated", 4, 1)])
def test_exchange_that_the_layout_allows_is_taken(exchange: str, tp: int, dp: int) -> None:
    EngineConfig(exchange=ExchangeConfig(exchange=exchange), parallel=ParallelConfig(tp, dp))


@pytest.mark.parametrize("exchange", ["auto", "replicated", "collective"])
def test_in_network_reduction_is_for_nvlink(exchange: str) -> None:
    assert not ExchangeConfig().in_network_reduction
    with pytest.raises(ConfigError, match=f"in_network_reduction is .* is '{exchange}'"):
        ExchangeConfig(exchange=exchange, in_network_reduction=True)


def test_in_network_reduction_is_for_sums_over_all_ranks() -> None:
    exchange = ExchangeConfig(exchange="nvlink", in_network_reduction=True)
    EngineConfig(exchange=exchange, parallel=ParallelConfig(4, 1))
    with pytest.raises(
        ConfigError, match=r"in_network_reduction .* attention_tp 2 x attention_dp 2"
    ):
        EngineConfig(exchange=exchange, parallel=ParallelConfig(2, 2))


@pytest.mark.parametrize("skew", [-0.1, 4.1, math.nan])
def test_expert_skew_is_bounded_and_for_dummy_weights_only(skew):
    assert "[0, 4]" in refusal(EngineConfig, load_format="dummy", dummy_expert_skew=skew)
    assert "dummy" in refusal(EngineConfig, dummy_expert_skew=1.0)
    EngineConfig(load_format="dummy", dummy_expert_skew=1.0)
