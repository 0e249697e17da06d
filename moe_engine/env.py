"""The environment variables that moe_engine knows, and the only code that reads or builds them.

============================  =====================================================================
``RANK``                      global rank of this process; set by torchrun, absent otherwise
``WORLD_SIZE``                number of ranks on all nodes
``LOCAL_RANK``                rank within the node
``LOCAL_WORLD_SIZE``          number of ranks on this node
``MASTER_ADDR``               host of rank 0
``MASTER_PORT``               port of rank 0's rendezvous
``MOE_ENGINE_LOG_LEVEL``      least severe messages shown: debug, info, warning or error
============================  =====================================================================
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from moe_engine.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Environment:
    """The variables above, parsed; the defaults describe a process that nobody launched.

    Attributes:
        launched: whether a launcher such as torchrun started this process as one of its ranks.
        log_level: None where the variable is not set.
    """

    launched: bool = False
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int | None = None
    log_level: str | None = None


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Parse ``variables`` (this process's, if None); `ConfigError` for one that makes no sense."""
    if variables is None:
        variables = os.environ
    log_level = variables.get("MOE_ENGINE_LOG_LEVEL") or None
    if log_level is not None and log_level not in LOG_LEVELS:
        raise ConfigError(
            f"MOE_ENGINE_LOG_LEVEL is {log_level!r}; it must be one of {', '.join(LOG_LEVELS)}"
        )
    if "RANK" not in variables:
        return Environment(log_level=log_level)

    rank = _integer(variables, "RANK")
    world_size = _integer(variables, "WORLD_SIZE")
    local_rank = _integer(variables, "LOCAL_RANK")
    local_world_size = _integer(variables, "LOCAL_WORLD_SIZE")
    for name, value, of, size in (
        ("RANK", rank, "WORLD_SIZE", world_size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size),
        ("LOCAL_WORLD_SIZE - 1", local_world_size - 1, "WORLD_SIZE", world_size),
    ):
        if not 0 <= value < size:
            raise ConfigError(f"{name} is {value}; with {of}={size} it must be in [0, {size})")
    return Environment(
        launched=True,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=variables.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_integer(variables, "MASTER_PORT"),
        log_level=log_level,
    )


def share_without_multicast() -> None:
    """Before PyTorch shares memory among GPUs: no multicast object with it, unless somebody says.

    Our kernels use one for in-network reduction alone, and not every system that offers them can
    make them.
    """
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


def child_environment(
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    master_addr: str,
    master_port: int,
    **extra: str,
) -> dict[str, str]:
    """The environment for a rank that this process starts: its own, with torchrun's variables set.

    Args:
        extra: further variables for the child, e.g. ``OMP_NUM_THREADS="1"``.
    """
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
        **extra,
    }


def _integer(variables: Mapping[str, str], name: str) -> int:
    text = variables.get(name)
    if text is None:
        raise ConfigError(f"RANK is set but {name} is not; start the ranks with torchrun")
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; it must be an integer") from None


def local_rank_environment(rank: int, world_size: int) -> dict[str, str]:
    """The environment of a rank of a world that lives on this node only.

    The ranks meet through a file, so there is no master port. What the user has set stays:

    * gloo talks over loopback, whatever the machine's host name resolves to;
    * the ranks share the cores, and their OpenMP threads sleep while they wait: threads that spin
      on a core that another process needs made a step forty times slower.
    """
    num_cores = len(os.sched_getaffinity(0))
    defaults = {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(max(1, num_cores // world_size)),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    return child_environment(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        master_addr="127.0.0.1",
        master_port=0,
        **{name: os.environ.get(name, value) for name, value in defaults.items()},
    )
