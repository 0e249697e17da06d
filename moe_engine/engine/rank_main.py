"""The process of one rank: ``python -m moe_engine.engine.rank_main SPEC [FD]``.

Rank 0 also runs the scheduler and talks to the front end over the inherited connection FD; the
other ranks follow its plans. A rank that raises reports its traceback to rank 0; a rank that loses
rank 0 ends itself, so that no process is left behind.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import NoReturn

from moe_engine import env, garbage, log
from moe_engine.config import EngineConfig
from moe_engine.dist.channel import Channel, ChannelClosed
from moe_engine.dist.communicator import PeerLostError
from moe_engine.dist.layout import RankLayout
from moe_engine.dist.rendezvous import connect_control, open_store, publish_control
from moe_engine.engine.control import ControlHub
from moe_engine.engine.core import EngineCore
from moe_engine.engine.launcher import torchrun_spec
from moe_engine.engine.model_directory import resolve_model
from moe_engine.engine.pending import PendingStep
from moe_engine.engine.runtime import LocalPlace, RankRuntime
from moe_engine.engine.scheduler import Scheduler
from moe_engine.engine.spec import RankSpec
from moe_engine.engine.startup import StartupClock, measured_memory
from moe_engine.engine.summary import start_summary
from moe_engine.errors import CheckpointError, ConfigError, ExchangeTimeout
from moe_engine.types.messages import (
    EngineReady,
    LoadProgress,
    RankFailed,
    RankHello,
    RankReady,
    RankStarted,
    RunStep,
    Shutdown,
    StartStepping,
    StepDone,
    ToCore,
    ToRank,
)

logger = log.get_logger(__name__)


def run_rank(spec: RankSpec, front_end_fd: int | None = None) -> None:
    """Run this process's rank until the engine shuts down; a failure ends the process.

    Args:
        spec: the same for all ranks.
        front_end_fd: rank 0's connection to the front end.
    """
    garbage.settle()  # modules stay, and compilers make much that need not be looked at so often
    process = env.read_environment()
    log.setup_logging(process.log_level or "info", rank=process.rank)
    parallel = spec.config.parallel
    layout = RankLayout(process.rank, parallel.attention_tp, parallel.attention_dp)
    place = LocalPlace(process.local_rank, process.local_world_size)
    if process.rank == 0:
        assert front_end_fd is not None
        _lead(spec, layout, place, front_end_fd)
    else:
        _follow(spec, layout, place)


def run_torchrun_rank(config: EngineConfig, environment: env.Environment) -> None:
    """Run a rank other than 0 that torchrun has started with the server's own command line.

    Raises:
        ConfigError: torchrun's world is not the configured layout's.
    """
    # torchrun forwards its signals to all ranks: it is rank 0's server that finishes what is open
    # and then ends the others.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    config = replace(config, model=str(resolve_model(config.model)))
    run_rank(torchrun_spec(config, environment))


def _lead(spec: RankSpec, layout: RankLayout, place: LocalPlace, front_end_fd: int) -> None:
    clock = StartupClock(spec.asked_at)
    clock.mark("process and imports")
    hub = ControlHub(Channel(Connection(front_end_fd), ToCore))
    hub.hear_front_end()
    try:
        store = open_store(spec.store_file, 0, layout.world_size)
        if layout.world_size > 1:
            hub.accept_ranks(publish_control(store, spec.control_address), layout.world_size)
        runtime = RankRuntime(spec.config, layout, place, clock)
        runtime.join(store)
        num_blocks = runtime.load(
            lambda stage, done, total: hub.tell_front_end(LoadProgress(stage, done, total))
        )
        for _ in range(layout.world_size - 1):
            num_blocks = min(num_blocks, hub.ready.get().num_blocks)
        clock.mark("other ranks")
        hub.tell_ranks(StartStepping(num_blocks))
        runtime.start(num_blocks)
        for _ in range(layout.world_size - 1):
            hub.started.get()
        clock.mark("other ranks")
        scheduler = _make_scheduler(runtime, num_blocks)
        core = EngineCore(
            scheduler,
            runtime.runner,
            hub,
            pipeline_depth=runtime.pipeline_depth,
            launches_ahead=runtime.device.type == "cuda",
            step_timeout=spec.config.step_timeout,
        )
        garbage.settle()
        hub.tell_front_end(
            EngineReady(
                max_model_len=runtime.max_model_len,
                vocab_size=runtime.model_config.vocab_size,
                num_blocks_per_group=num_blocks,
                block_size=spec.config.cache.block_size,
                eos_token_ids=list(runtime.model_config.eos_token_ids),
                summary=start_summary(runtime, num_blocks),
                startup_s=clock.seconds,
                memory=runtime.ledger,
                measured_memory=measured_memory(runtime.device),
            )
        )
        core.run()
    except Exception as error:
        hub.fail(_describe(0, error))
    hub.stop()


def _make_scheduler(runtime: RankRuntime, num_blocks: int) -> Scheduler:
    config = runtime.config
    return Scheduler(
        replace(config.scheduler, pipeline_depth=runtime.pipeline_depth),
        config.cache,
        num_groups=config.parallel.attention_dp,
        num_blocks=num_blocks,
        max_model_len=runtime.max_model_len,
        eos_token_ids=runtime.model_config.eos_token_ids,
        seed=config.seed,
    )


def _follow(spec: RankSpec, layout: RankLayout, place: LocalPlace) -> None:
    store = open_store(spec.store_file, layout.rank, layout.world_size)
    channel: Channel[ToRank] = connect_control(store, ToRank)
    channel.send(RankHello(layout.rank))
    inbox: queue.SimpleQueue[StartStepping | RunStep | Shutdown] = queue.SimpleQueue()
    threading.Thread(target=_hear_leader, args=(channel, inbox), daemon=True).start()
    launched: queue.SimpleQueue[PendingStep | None] = queue.SimpleQueue()
    sender = threading.Thread(
        target=_send_results, args=(channel, layout.rank, launched), daemon=True
    )
    sender.start()
    try:
        runtime = RankRuntime(spec.config, layout, place, StartupClock(spec.asked_at))
        runtime.join(store)
        channel.send(RankReady(layout.rank, runtime.load(lambda *_: None)))
        while not isinstance(message := inbox.get(), Shutdown):
            if isinstance(message, StartStepping):
                runtime.start(message.num_blocks)
                garbage.settle()
                channel.send(RankStarted(layout.rank))
                continue
            launched.put(runtime.runner.launch(message.plan))
        launched.put(None)
        sender.join()
    except Exception as error:
        _give_up(channel, layout.rank, error)


def _send_results(
    channel: Channel[ToRank], rank: int, launched: queue.SimpleQueue[PendingStep | None]
) -> None:
    """Wait for launched steps in order and send their results, until a None comes.

    A thread of its own, so that the next step's launch need not wait for a result.
    """
    try:
        while (pending := launched.get()) is not None:
            result = pending.result()
            if result is not None:
                channel.send(StepDone(result))
    except ChannelClosed:
        return  # the thread that hears rank 0 knows whether that is a failure
    except Exception as error:
        _give_up(channel, rank, error)


def _give_up(channel: Channel[ToRank], rank: int, error: Exception) -> NoReturn:
    """Report what this rank has raised and end its process, whichever thread this is."""
    if not isinstance(error, ChannelClosed):
        failure = _describe(rank, error)
        logger.error("%s\n%s", failure.message, failure.traceback)
        with suppress(ChannelClosed):
            channel.send(failure)
    os._exit(1)


def _hear_leader(
    channel: Channel[ToRank], inbox: queue.SimpleQueue[StartStepping | RunStep | Shutdown]
) -> None:
    """Queue rank 0's messages; when rank 0 has gone, end this process whatever it is doing."""
    while True:
        try:
            message = channel.receive()
        except ChannelClosed:
            os._exit(1)
        inbox.put(message)
        if isinstance(message, Shutdown):
            return


def _describe(rank: int, error: Exception) -> RankFailed:
    user_error = isinstance(error, ConfigError | CheckpointError)
    return RankFailed(
        rank,
        str(error) if user_error else f"rank {rank} raised {type(error).__name__}: {error}",
        "" if user_error else traceback.format_exc(),
        user_error=type(error).__name__ if user_error else "",
        secondary=isinstance(error, PeerLostError | ExchangeTimeout),
    )


if __name__ == "__main__":
    run_rank(RankSpec.read(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
