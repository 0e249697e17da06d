"""What a rank process is told when it starts, as a small JSON file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from moe_engine.config import EngineConfig


class RankSpec(msgspec.Struct, frozen=True):
    """The same for every rank of a world; the rank's number comes from its environment.

    Attributes:
        config: the engine's configuration, ``config.model`` resolved to a directory.
        store_file: rendezvous file of a world on one node; None under torchrun.
        control_address: where rank 0 listens for the other ranks: a Unix socket path, or
            (host, port) under torchrun.
    """

    config: EngineConfig
    store_file: str | None
    control_address: str | tuple[str, int]

    def write(self, path: Path) -> None:
        """Save as JSON."""
        path.write_bytes(msgspec.json.encode(self))

    @staticmethod
    def read(path: str) -> RankSpec:
        """Load what `write` saved."""
        return msgspec.json.decode(Path(path).read_bytes(), type=RankSpec)
