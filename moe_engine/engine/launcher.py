"""Starts the rank processes of one node and watches over them.

Each rank is a fresh interpreter (never a fork, never a re-import of the user's script), so an
engine can be made at the top level of a script or in a notebook cell.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from moe_engine import env
from moe_engine.config import EngineConfig
from moe_engine.dist.channel import Channel
from moe_engine.engine.spec import RankSpec
from moe_engine.errors import ConfigError
from moe_engine.types.messages import ToFrontEnd

RANK_MODULE = "moe_engine.engine.rank_main"
"""What a rank process runs; a benchmark of the front end puts something else there."""

EXIT_GRACE = 5.0
"""Seconds that ranks have to leave by themselves before they are killed."""


class RankProcesses:
    """The rank processes that this process has started; rank 0 among them.

    Args:
        config: ``config.model`` must be a directory.
        torchrun: under torchrun, only rank 0 is started (torchrun has started the others), and
            the ranks meet over TCP; otherwise all ranks of the world are started here.
    """

    def __init__(self, config: EngineConfig, torchrun: env.Environment | None = None) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="moe_engine-"))
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._saw_dead: float | None = None
        self._killing = threading.Lock()
        self._finalizer = weakref.finalize(self, _clean_up, self._processes, self._directory)
        ours, theirs = Pipe(duplex=True)
        try:
            self._start(config, torchrun, theirs)
        except BaseException:
            self.kill()
            raise
        finally:
            theirs.close()
        self.channel: Channel[ToFrontEnd] = Channel(ours, ToFrontEnd)

    def _start(
        self, config: EngineConfig, torchrun: env.Environment | None, front_end: Connection
    ) -> None:
        spec_path = self._directory / "spec.json"
        if torchrun is not None:
            torchrun_spec(config, torchrun).write(spec_path)
            ranks: Sequence[int] = [0]
        else:
            spec = RankSpec(
                config,
                str(self._directory / "store"),
                str(self._directory / "control.sock"),
                time.perf_counter(),
            )
            spec.write(spec_path)
            ranks = range(config.parallel.world_size)
        for rank in ranks:
            command = [sys.executable, "-m", RANK_MODULE, str(spec_path)]
            inherited = [front_end.fileno()] if rank == 0 else []
            self._processes[rank] = subprocess.Popen(
                [*command, *map(str, inherited)],
                env=None if torchrun else env.local_rank_environment(rank, len(ranks)),
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def obituary(self, rank: int, wait: float) -> str:
        """How a rank's process ended, in words, allowing it ``wait`` seconds to end.

        Empty if it is alive or was not started here.
        """
        process = self._processes.get(rank)
        if process is None:
            return ""
        try:
            status = process.wait(wait)
        except subprocess.TimeoutExpired:
            return ""
        if status < 0:
            return f"killed by signal {-status} ({signal.Signals(-status).name})"
        return f"exited with status {status}"

    def first_dead(self) -> int | None:
        """The lowest rank of ours whose process has ended."""
        ended = (rank for rank, process in self._processes.items() if process.poll() is not None)
        return min(ended, default=None)

    def dead_since(self) -> float:
        """Seconds since `dead_since` first saw a rank of ours dead; 0 while all live."""
        if self.first_dead() is None:
            return 0.0
        self._saw_dead = self._saw_dead or time.monotonic()
        return time.monotonic() - self._saw_dead

    def join(self, grace: float = EXIT_GRACE) -> None:
        """Wait for all ranks to leave, then kill those that have not after ``grace`` seconds."""
        deadline = time.monotonic() + grace
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.kill()

    def kill(self) -> None:
        """Leave no process and no file behind, also if another thread is about to do so."""
        with self._killing:
            self._finalizer()


def _clean_up(processes: dict[int, subprocess.Popen[bytes]], directory: Path) -> None:
    """Kill the processes that still live, and remove the directory; also runs at exit."""
    for process in processes.values():
        if process.poll() is None:
            process.kill()
    for process in processes.values():
        process.wait()
    shutil.rmtree(directory, ignore_errors=True)


def torchrun_spec(config: EngineConfig, environment: env.Environment) -> RankSpec:
    """The spec of every rank under torchrun: they meet over TCP at the rendezvous host.

    Raises:
        ConfigError: torchrun's world is not the configured layout's.
    """
    parallel = config.parallel
    if environment.world_size != parallel.world_size:
        raise ConfigError(
            f"torchrun has started {environment.world_size} ranks, but attention_tp "
            f"{parallel.attention_tp} x attention_dp {parallel.attention_dp} needs "
            f"{parallel.world_size}"
        )
    return RankSpec(config, None, (environment.master_addr, 0), time.perf_counter())
