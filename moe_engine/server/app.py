"""`create_app`: the FastAPI application around an engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from moe_engine import __version__
from moe_engine.config import ServerConfig
from moe_engine.config.engine import DEMO_MODEL_NAME
from moe_engine.errors import MoEEngineError
from moe_engine.server import chat, completions, status
from moe_engine.server.body import BodyLimitMiddleware
from moe_engine.server.context import ServerContext
from moe_engine.server.errors import install_error_handlers
from moe_engine.server.metrics import ServerMetrics
from moe_engine.server.openapi import install_openapi
from moe_engine.server.request_id import RequestIdMiddleware

if TYPE_CHECKING:
    from moe_engine.engine.async_llm import AsyncMoEEngine

logger = logging.getLogger(__name__)


def create_app(engine: AsyncMoEEngine, config: ServerConfig) -> FastAPI:
    """An application that starts ``engine`` when it starts, and shuts it down when it ends.

    The engine loads in the background, so that ``/health`` can answer 503 meanwhile. How that
    went is told by the task ``app.state.startup``.
    """
    model_name = config.served_model_name or DEMO_MODEL_NAME
    metrics = ServerMetrics(lambda: engine.stats, model_name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.startup = asyncio.create_task(_start(engine))
        try:
            yield
        finally:
            app.state.startup.cancel()
            await asyncio.gather(app.state.startup, return_exceptions=True)
            await engine.shutdown()

    app = FastAPI(
        title="moe_engine",
        version=__version__,
        description="OpenAI-compatible inference server for Qwen3-MoE models.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.context = ServerContext(engine, model_name, metrics)
    for router in (status.router, completions.router, chat.router):
        app.include_router(router)
    install_error_handlers(app)
    install_openapi(app)
    app.add_middleware(BodyLimitMiddleware, max_bytes=config.max_body_bytes)
    app.add_middleware(RequestIdMiddleware)
    return app


async def _start(engine: AsyncMoEEngine) -> None:
    try:
        await engine.start()
    except MoEEngineError:
        raise  # the operator's to mend; whoever runs the server says so in one message
    except Exception:
        logger.exception("the engine could not start")
        raise
