"""The server process: a socket taken early, uvicorn around the application, signals, exit."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from moe_engine import garbage
from moe_engine.config import ServerConfig
from moe_engine.errors import EngineDeadError
from moe_engine.server.app import create_app

if TYPE_CHECKING:
    from moe_engine.engine.async_llm import AsyncMoEEngine

# A dead engine answers 503 for this long, so that health probes can tell it from a lost network.
DEAD_GRACE_S = 2.0
# Open requests may go on for this long after SIGTERM; Kubernetes kills after 30 s.
SHUTDOWN_GRACE_S = 20
# Then they get an error, which their clients have this long to read.
LAST_WORDS_S = 5
# Ctrl-C under a launcher arrives twice, from the terminal and from the launcher: that is one wish.
ONE_WISH_S = 1.0
BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host:port`` (port 0: a free one); clients queue up from now on.

    Raises:
        OSError: the address is in use, unknown, or not allowed.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Without listen, a second server could bind the same address too.
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


async def run_server(
    make_engine: Callable[[], AsyncMoEEngine], config: ServerConfig, listener: socket.socket
) -> Exception | None:
    """Serve until SIGINT or SIGTERM (a second one does not wait for open requests).

    Args:
        make_engine: called inside the event loop.
        listener: a socket from `bind`.

    Returns:
        What made the server end, or None if it was a signal.
    """
    engine = make_engine()
    app = create_app(engine, config)
    server = _Server(
        engine,
        uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            log_level=config.log_level,
            timeout_graceful_shutdown=SHUTDOWN_GRACE_S + LAST_WORDS_S,
        ),
    )
    server.stop_on_signals()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    watching = asyncio.create_task(_watch(engine, app, config, listener, server))
    await asyncio.wait((serving, watching), return_when=asyncio.FIRST_COMPLETED)
    # Either uvicorn is done because of a signal (which cancels a start under way), or there is a
    # failure for which it must end.
    failure: Exception | None = engine.error
    if watching.done() and not watching.cancelled():
        failure = watching.result()
    watching.cancel()
    server.should_exit = True
    await serving
    return failure


async def _watch(
    engine: AsyncMoEEngine,
    app: FastAPI,
    config: ServerConfig,
    listener: socket.socket,
    server: _Server,
) -> Exception | None:
    """Say when the engine is ready; return why it is not, or, later, why it died."""
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        await app.state.startup
    except Exception as error:
        return error
    garbage.settle()
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(engine.info.summary)
    print(f"Ready: {config.served_model_name} at http://{host}:{port}/v1", flush=True)
    await engine.died.wait()
    await asyncio.sleep(DEAD_GRACE_S)
    return engine.error or EngineDeadError("the engine died")


class _Server(uvicorn.Server):
    """uvicorn with signal handling that ends in exit status 0 rather than in the signal itself.

    Open requests that are not done in time get the engine's error, never a bare broken connection.
    """

    def __init__(self, engine: AsyncMoEEngine, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._engine = engine
        self._first_signal: float | None = None
        self._ending: asyncio.Task[None] | None = None

    def stop_on_signals(self) -> None:
        """Make SIGINT and SIGTERM end the running event loop's server."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            print(
                f"Stopping: open requests have up to {SHUTDOWN_GRACE_S} s; another signal ends "
                "them at once",
                flush=True,
            )
            self.should_exit = True
            self._ending = asyncio.create_task(self._end_requests(SHUTDOWN_GRACE_S))
        elif now - self._first_signal > ONE_WISH_S and self._ending is not None:
            self._ending.cancel()
            self._ending = asyncio.create_task(self._end_requests(0))

    async def _end_requests(self, delay: float) -> None:
        await asyncio.sleep(delay)
        await self._engine.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
