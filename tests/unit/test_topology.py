"""Hops between ranks, and the order in which one writes to the others."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_engine.dist.topology import ACROSS_SWITCHES, Topology, from_domains, one_domain
from moe_engine.errors import ConfigError

TWO_OF_TWO = ((0, 1, 3, 3), (1, 0, 3, 3), (3, 3, 0, 1), (3, 3, 1, 0))


def test_the_examples() -> None:
    topology = from_domains([[0, 1], [2, 3]])
    assert topology == Topology(TWO_OF_TWO)
    assert topology.visiting_order(2) == [0, 1, 3, 2]
    assert topology.visiting_order(3) == [0, 1, 2, 3]
    assert topology.domains() == [[0, 1], [2, 3]]
    assert one_domain(4).visiting_order(2) == [3, 0, 1, 2]
    assert one_domain(1).visiting_order(0) == [0]


def test_across_switches_is_still_one_domain() -> None:
    topology = from_domains([[0, 2], [1]], between=ACROSS_SWITCHES)
    assert topology.domains() == [[0, 1, 2]]
    assert topology.visiting_order(0) == [1, 2, 0]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 1 << 20))
def test_far_ranks_come_first_and_nobody_is_forgotten(sizes: list[int], seed: int) -> None:
    ranks = list(range(sum(sizes)))
    random.Random(seed).shuffle(ranks)
    domains, at = [], 0
    for size in sizes:
        domains.append(ranks[at : at + size])
        at += size
    topology = from_domains(domains)
    assert sorted(map(sorted, domains)) == topology.domains()
    firsts = []
    for rank in sorted(ranks):
        order = topology.visiting_order(rank)
        assert sorted(order) == sorted(ranks)
        assert order[-1] == rank
        hops = [topology.hops[rank][other] for other in order]
        assert hops == sorted(hops, reverse=True)
        firsts.append(order[0])
    if len(domains) == 1:
        assert sorted(firsts) == sorted(ranks), "nobody is visited first by two"


@pytest.mark.parametrize(
    ("hops", "message"),
    [
        (((0, 1), (1,)), "rank 1 has hops to 1 ranks, and there are 2"),
        (((0, 4), (4, 0)), "4 hops from rank 0 to 1; it is 0 to itself and 1 to 3"),
        (((0, 0), (0, 0)), "0 hops from rank 0 to 1"),
        (((1, 1), (1, 0)), "1 hops from rank 0 to 0"),
        (((0, 1), (2, 0)), "1 hops from rank 0 to 1, and 2 back"),
    ],
)
def test_impossible_hops_are_refused_by_the_pair(
    hops: tuple[tuple[int, ...], ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Topology(hops)


@pytest.mark.parametrize("domains", [[[0, 1], [1]], [[0], [2]], [[1]]])
def test_domains_that_are_no_partition_are_refused(domains: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match=r"domains .*: each rank from 0 to"):
        from_domains(domains)
