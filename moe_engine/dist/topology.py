"""How far apart ranks are, and in which order one writes to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_engine.errors import ConfigError

SELF, SAME_DOMAIN, ACROSS_SWITCHES, NETWORK = range(4)
"""Hops: the rank itself; one NVLink switch between; more than one; a network."""


@dataclass(frozen=True)
class Topology:
    """The hops between any two ranks, by their numbers.

    Example, two NVLink domains of two GPUs, joined by a network:
    ``Topology(((0, 1, 3, 3), (1, 0, 3, 3), (3, 3, 0, 1), (3, 3, 1, 0)))``.
    """

    hops: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """`ConfigError` naming the pair of ranks whose hops cannot be."""
        size = len(self.hops)
        for rank, row in enumerate(self.hops):
            if len(row) != size:
                raise ConfigError(f"rank {rank} has hops to {len(row)} ranks, and there are {size}")
        for rank, row in enumerate(self.hops):
            for other, hops in enumerate(row):
                if hops not in range(NETWORK + 1) or (hops == SELF) != (rank == other):
                    raise ConfigError(
                        f"{hops} hops from rank {rank} to {other}; it is 0 to itself and 1 to "
                        f"{NETWORK} to others"
                    )
                back = self.hops[other][rank]
                if hops != back:
                    raise ConfigError(f"{hops} hops from rank {rank} to {other}, and {back} back")

    def visiting_order(self, rank: int) -> list[int]:
        """All ranks in the order in which one writes to them: far ones first, itself last.

        Those as far away are visited from the rank's own number on, so that nobody is written to
        by all at once.

        Example, as above: rank 2 writes to 0, 1, 3 and 2, rank 3 to 0, 1, 2 and 3; in one domain of
        four, rank 2 writes to 3, 0, 1 and 2.
        """
        size = len(self.hops)
        others = [(rank + step) % size for step in range(1, size)]
        return [*sorted(others, key=lambda other: -self.hops[rank][other]), rank]

    def domains(self) -> list[list[int]]:
        """The ranks that reach each other without a network, in order of their lowest number."""
        domains: list[list[int]] = []
        for rank, row in enumerate(self.hops):
            home = next((domain for domain in domains if row[domain[0]] < NETWORK), None)
            if home is None:
                domains.append([rank])
            else:
                home.append(rank)
        return domains


def one_domain(size: int) -> Topology:
    """Ranks that all reach each other through one switch."""
    return from_domains([list(range(size))])


def from_domains(domains: Sequence[Sequence[int]], between: int = NETWORK) -> Topology:
    """Ranks in NVLink domains, with so many hops between two domains.

    Example: ``from_domains([[0, 1], [2, 3]])`` is the example of `Topology`.

    Raises:
        ConfigError: a rank is in no domain or in two.
    """
    ranks = [rank for domain in domains for rank in domain]
    if sorted(ranks) != list(range(len(ranks))):
        raise ConfigError(
            f"domains {[list(domain) for domain in domains]}: each rank from 0 to "
            f"{len(ranks) - 1} must be in one"
        )
    home = {rank: number for number, domain in enumerate(domains) for rank in domain}

    def hops(a: int, b: int) -> int:
        if a == b:
            return SELF
        return SAME_DOMAIN if home[a] == home[b] else between

    numbers = range(len(ranks))
    return Topology(tuple(tuple(hops(a, b) for b in numbers) for a in numbers))
