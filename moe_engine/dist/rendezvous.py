"""How the ranks of a world find each other: a file on one node, or torchrun's environment."""

from __future__ import annotations

import msgspec
import torch.distributed as dist

from moe_engine.dist.channel import Channel, ChannelListener, Endpoint

CONTROL_KEY = "moe_engine/control"


def open_store(store_file: str | None, rank: int, world_size: int) -> dist.Store:
    """The key-value store of the world.

    Args:
        store_file: a path shared by all ranks of one node; None uses torchrun's environment
            variables (https://docs.pytorch.org/docs/stable/elastic/run.html).
    """
    if store_file is not None:
        return dist.FileStore(store_file, world_size)
    store, _, _ = next(dist.rendezvous("env://", rank, world_size))
    return store


def publish_control(store: dist.Store, address: str | tuple[str, int]) -> ChannelListener:
    """Rank 0: listen for the other ranks at ``address`` and say so in the store."""
    listener = ChannelListener(address)
    store.set(CONTROL_KEY, msgspec.json.encode(listener.endpoint).decode())
    return listener


def connect_control(store: dist.Store, received: object) -> Channel:
    """The other ranks: wait for rank 0's address and connect to it."""
    endpoint = msgspec.json.decode(store.get(CONTROL_KEY), type=Endpoint)
    return endpoint.connect(received)
