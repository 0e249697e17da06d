"""How far apart ranks are, and in which order one writes to the others.

The machine says it, or a YAML file: domains of ranks that reach each other through one NVLink
switch, and how far these are from each other, or the hops between any two ranks.

    domains: [[0, 1, 2, 3], [4, 5, 6, 7]]      hops: [[0, 1, 3],
    between: network                                  [1, 0, 3],
                                                      [3, 3, 0]]
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_engine.errors import ConfigError
from moe_engine.log import get_logger

logger = get_logger(__name__)

SELF, SAME_DOMAIN, ACROSS_SWITCHES, NETWORK = range(4)
"""Hops: the rank itself; one NVLink switch between; more than one; a network."""
BETWEEN = {"same_domain": SAME_DOMAIN, "across_switches": ACROSS_SWITCHES, "network": NETWORK}
"""What a file may say lies between two domains."""

FABRIC_IS_UP = 3  # NVML_GPU_FABRIC_STATE_COMPLETED


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


@dataclass(frozen=True)
class Place:
    """Where a rank's GPU is.

    Attributes:
        fabric: name of the NVLink fabric that joins it with GPUs of other hosts, "" without one.
    """

    host: str
    fabric: str = ""


def gpu_place(device: torch.device) -> Place:
    """Where a GPU is, as NVML says; by its host alone without the package nvidia-ml-py."""
    host = socket.gethostname()
    try:
        import pynvml
    except ImportError:
        return Place(host)
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        info = pynvml.c_nvmlGpuFabricInfo_t()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
        pynvml.nvmlDeviceGetGpuFabricInfo(handle, info)
    except pynvml.NVMLError as error:  # no fabric on this machine, or a driver that knows none
        logger.debug("NVML tells of no NVLink fabric: %s", error)
        return Place(host)
    cluster = bytes(info.clusterUuid)
    if info.state != FABRIC_IS_UP or not any(cluster):
        return Place(host)
    return Place(host, f"{cluster.hex()}/{info.cliqueId}")


def from_places(places: Sequence[Place]) -> Topology:
    """GPUs of one host, or of one fabric, are one domain; a network joins the others.

    Example: of hosts a, a, b without a fabric, ranks 0 and 1 are a domain, and 2 is one.
    """
    domains: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        domains.setdefault(place.fabric or f"host {place.host}", []).append(rank)
    return from_domains(list(domains.values()))


def from_file(path: Path, num_ranks: int) -> Topology:
    """What a YAML file says, as above.

    Raises:
        ConfigError: it cannot be read, is malformed, or is of another number of ranks; the message
            names it.
    """
    try:
        topology = _parsed(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeError, yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"topology {path}: {error}") from error
    if len(topology.hops) != num_ranks:
        raise ConfigError(f"topology {path}: it has {len(topology.hops)} ranks, not {num_ranks}")
    return topology


def _parsed(document: Any) -> Topology:
    if not isinstance(document, dict) or not ({"hops", "domains"} & document.keys()):
        raise ConfigError("it must have domains or hops")
    known = {"hops"} if "hops" in document else {"domains", "between"}
    unknown = document.keys() - known
    if unknown:
        raise ConfigError(f"{', '.join(map(str, sorted(unknown)))} cannot be there")
    rows = document["hops" if "hops" in document else "domains"]
    if not _are_numbers(rows):
        raise ConfigError(f"{rows} is not a list of lists of whole numbers")
    if "hops" in document:
        return Topology(tuple(map(tuple, rows)))
    between = document.get("between", "network")
    if between not in BETWEEN:
        raise ConfigError(f"between is {between!r}; it is one of {', '.join(BETWEEN)}")
    return from_domains(rows, BETWEEN[between])


def _are_numbers(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and all(type(number) is int for number in row) for row in rows
    )
