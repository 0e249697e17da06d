"""Hops between ranks, and the order in which one writes to the others."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_engine.dist.topology import (
    ACROSS_SWITCHES,
    Place,
    Topology,
    from_domains,
    from_file,
    from_places,
    one_domain,
)
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


def test_hosts_and_fabrics_are_domains() -> None:
    assert from_places([Place("a"), Place("a"), Place("b"), Place("b")]) == Topology(TWO_OF_TWO)
    rack = [Place("a", "f1"), Place("b", "f1"), Place("c", "f2"), Place("c", "f2")]
    assert from_places(rack).domains() == [[0, 1], [2, 3]]
    # A fabric is not the host of the same name.
    assert from_places([Place("a"), Place("b", "host a")]).domains() == [[0, 1]]


@pytest.mark.parametrize(
    ("text", "domains"),
    [
        ("domains: [[0, 1], [2, 3]]", [[0, 1], [2, 3]]),
        ("domains: [[0, 3], [1, 2]]\nbetween: across_switches", [[0, 1, 2, 3]]),
        ("hops: [[0, 1, 3, 3], [1, 0, 3, 3], [3, 3, 0, 1], [3, 3, 1, 0]]", [[0, 1], [2, 3]]),
    ],
)
def test_a_file_says_it(tmp_path: Path, text: str, domains: list[list[int]]) -> None:
    path = tmp_path / "rack.yaml"
    path.write_text(text)
    assert from_file(path, 4).domains() == domains


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it must have domains or hops"),
        ("[1]", "it must have domains or hops"),
        ("domains: [[0, 1]]", "it has 2 ranks, not 4"),
        ("domains: [[0, 1], [1, 2]]", "each rank from 0 to 3 must be in one"),
        ("domains: [0, 1]", "is not a list of lists of whole numbers"),
        ("domains: [[0, yes]]", "is not a list of lists of whole numbers"),
        ("domains: [[0]]\nbetween: space", "between is 'space'; it is one of same_domain"),
        ("domains: [[0]]\nhop: 1", "hop cannot be there"),
        ("hops: [[0, 1], [1, 0]]\nbetween: network", "between cannot be there"),
        ("hops: [[1]]", "1 hops from rank 0 to 0"),
        ("domains: [", "topology .*rack.yaml: "),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_its_name(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "rack.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        from_file(path, 4)
    assert "rack.yaml" in str(raised.value)
    with pytest.raises(ConfigError, match=r"no\.yaml"):
        from_file(tmp_path / "no.yaml", 4)
