"""The process groups of a rank: its attention-TP group, and the whole world for the experts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_engine.dist.communicator import Communicator
from moe_engine.dist.layout import RankLayout


@dataclass(frozen=True)
class ParallelGroups:
    """A rank's place and the communicators that its layers use."""

    layout: RankLayout
    tp: Communicator
    ep: Communicator


def single_rank_groups() -> ParallelGroups:
    """The groups of a world of one rank."""
    return ParallelGroups(RankLayout(0, 1, 1), Communicator(1, 0), Communicator(1, 0))


def create_groups(
    layout: RankLayout, store: dist.Store, device: torch.device, timeout: float
) -> ParallelGroups:
    """Join the world through ``store`` and make the groups (a collective over all ranks).

    Args:
        timeout: seconds after which a collective that a peer does not join is an error.
    """
    if layout.world_size == 1:
        return single_rank_groups()
    backend = "nccl" if device.type == "cuda" else "gloo"
    deadline = timedelta(seconds=timeout)
    dist.init_process_group(
        backend,
        store=store,
        rank=layout.rank,
        world_size=layout.world_size,
        timeout=deadline,
        device_id=device if device.type == "cuda" else None,
    )
    world = dist.group.WORLD
    ep = Communicator(layout.world_size, layout.rank, world)
    tp_group = world
    if layout.attention_dp > 1:
        for dp_rank in range(layout.attention_dp):
            group = dist.new_group(list(layout.group_ranks(dp_rank)), timeout=deadline)
            if dp_rank == layout.dp_rank:
                tp_group = group
    return ParallelGroups(layout, Communicator(layout.attention_tp, layout.tp_rank, tp_group), ep)
