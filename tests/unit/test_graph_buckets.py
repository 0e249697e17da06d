"""Which batch sizes are captured as CUDA graphs, and which one a batch runs in."""

import pytest

from moe_engine.config import ExchangeConfig
from moe_engine.dist.communicator import Communicator
from moe_engine.dist.exchange import ExchangeSelector
from moe_engine.dist.groups import ParallelGroups, single_rank_groups
from moe_engine.dist.layout import RankLayout
from moe_engine.engine.graphs import capturable_buckets, graph_buckets, pick_bucket


def test_sizes_are_dense_where_padding_would_cost():
    assert graph_buckets(256) == [
        *(1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
    ]


@pytest.mark.parametrize("max_rows", [1, 2, 3, 5, 8, 9, 64, 65, 100, 255, 257, 512, 513, 1000])
def test_every_batch_has_a_size_and_little_padding(max_rows):
    buckets = graph_buckets(max_rows)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == max_rows
    for num_rows in range(1, max_rows + 1):
        size = pick_bucket(num_rows, buckets)
        assert size is not None
        assert size >= num_rows
        assert size == min(bucket for bucket in buckets if bucket >= num_rows)
        if num_rows > 32:
            assert (size - num_rows) / num_rows < 0.25
        assert pick_bucket(size, buckets) == size


def test_a_larger_batch_has_none():
    assert pick_bucket(9, [1, 2, 4, 8]) is None
    assert pick_bucket(1, []) is None


def selector(tp, dp, **options):
    if tp * dp == 1:
        groups = single_rank_groups()
    else:
        layout, nobody = RankLayout(0, tp, dp), object()
        groups = ParallelGroups(
            layout, Communicator(tp, 0, nobody), Communicator(tp * dp, 0, nobody)
        )
    return ExchangeSelector(ExchangeConfig(**options), groups, 8)


def test_one_rank_captures_all_sizes():
    assert capturable_buckets(20, selector(1, 1)) == [1, 2, 4, 8, 16, 20]


def test_replicated_exchange_is_captured_as_far_as_it_is_chosen():
    assert capturable_buckets(64, selector(2, 1, replicated_max_tokens=10)) == [1, 2, 4, 8]
    everything = selector(2, 1, exchange="replicated")
    assert capturable_buckets(64, everything) == graph_buckets(64)


def test_collective_exchange_is_never_captured():
    assert capturable_buckets(64, selector(1, 2)) == []
    assert capturable_buckets(64, selector(2, 1, exchange="collective")) == []
    assert capturable_buckets(64, selector(1, 1, exchange="collective")) == []
