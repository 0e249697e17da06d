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
        asked_at: `time.perf_counter` on this machine when the ranks were asked for; rank 0's start
            is timed from then on.
    """

    config: EngineConfig
    store_file: str | None
    control_address: str | tuple[str, int]
    asked_at: float

    def write(self, path: Path) -> None:
        """Save as JSON."""
        path.write_bytes(msgspec.json.encode(self))

    @staticmethod
    def read(path: str) -> RankSpec:
        """Load what `write` saved."""
        return msgspec.json.decode(Path(path).read_bytes(), type=RankSpec)
