"""A real uvicorn on a loopback port, in a thread, around the fake engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from moe_engine.config import ServerConfig
from moe_engine.server.app import create_app
from moe_engine.server.launch import bind
from tests.unit.server.fake_engine import FakeEngine

MODEL = "org/fake-model"


class LiveServer:
    """A running server and ways to talk to it."""

    def __init__(self, engine: FakeEngine, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = engine
        self.url = url
        self.loop = loop
        # Loading certificates takes longer than most tests.
        self.http = httpx.Client(base_url=url, timeout=10, verify=False)
        self.openai = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=self.http
        )

    def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": "Hello", **fields}
        return self.http.post("/v1/completions", json=body)

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def call(self, function: Callable[[], object]) -> None:
        """Run ``function`` on the server's event loop and wait for it."""
        done = threading.Event()

        def run() -> None:
            function()
            done.set()

        self.loop.call_soon_threadsafe(run)
        assert done.wait(5)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.005)


@contextmanager
def running_server(engine: FakeEngine, *, wait_ready: bool = True) -> Iterator[LiveServer]:
    config = ServerConfig(port=0, served_model_name=MODEL, max_body_bytes=1 << 20)
    listener = bind(config.host, config.port)
    app = create_app(engine, config)  # type: ignore[arg-type]
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(server.serve(sockets=[listener]))
    )
    thread.start()
    live = LiveServer(engine, f"http://127.0.0.1:{listener.getsockname()[1]}", loop)
    try:
        live.wait_until(lambda: server.started)
        if wait_ready:
            live.wait_until(lambda: engine.state == "ready")
        yield live
    finally:
        live.http.close()
        server.should_exit = True
        thread.join(10)
        loop.close()
        listener.close()
    assert not thread.is_alive()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def fresh(engine: FakeEngine) -> Iterator[LiveServer]:
    """A server of this test's own."""
    with running_server(engine) as server:
        yield server


@pytest.fixture(scope="session")
def shared() -> Iterator[LiveServer]:
    with running_server(FakeEngine()) as server:
        yield server


@pytest.fixture
def live(shared: LiveServer) -> LiveServer:
    """A ready server that other tests have used before: its metrics do not start at 0."""
    shared.wait_until(lambda: not shared.engine.active)
    shared.engine.reset()
    shared.engine.state = "ready"
    return shared
