"""`ServerContext`: what every request handler needs, and the checks that come before any work."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request, Response
from pydantic import BaseModel

from moe_engine.errors import EngineDeadError, InvalidRequestError
from moe_engine.server.errors import EngineNotReadyError
from moe_engine.server.metrics import ServerMetrics
from moe_engine.server.prompts import PromptEncoder
from moe_engine.server.protocol.base import ModelCard

if TYPE_CHECKING:
    from moe_engine.engine.async_llm import AsyncMoEEngine


@dataclass
class ServerContext:
    """The engine, the name it is served under, and the metrics.

    Attributes:
        created: Unix time in seconds at which the server came up; the model's ``created``.
    """

    engine: AsyncMoEEngine
    model_name: str
    metrics: ServerMetrics
    created: int = field(default_factory=lambda: int(time.time()))
    _encoder: PromptEncoder | None = None

    def check_ready(self) -> None:
        """Raise `EngineNotReadyError` or `EngineDeadError` unless the engine can serve."""
        if self.engine.state == "dead":
            raise self.engine.error or EngineDeadError("it could not start")
        if self.engine.state != "ready":
            raise EngineNotReadyError

    def check_model(self, name: str) -> None:
        """Raise a 404 unless ``name`` is the served model."""
        if name != self.model_name:
            raise InvalidRequestError(
                f"the model {name!r:.200} does not exist; this server has {self.model_name!r}",
                param="model",
                status=404,
                code="model_not_found",
            )

    @property
    def encoder(self) -> PromptEncoder:
        """Turns prompts into token ids; exists once the engine is ready."""
        if self._encoder is None:
            self._encoder = PromptEncoder(self.engine.tokenizer, self.engine.info)
        return self._encoder

    def model_card(self) -> ModelCard:
        """The description of the served model; needs a ready engine."""
        return ModelCard(
            id=self.model_name,
            created=self.created,
            max_model_len=self.engine.info.max_model_len,
        )


async def get_context(request: Request) -> ServerContext:
    """The context of the application; not a plain function, for which FastAPI takes a thread."""
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context


Context = Annotated[ServerContext, Depends(get_context)]


@dataclass(frozen=True)
class Identity:
    """What all parts of an answer have in common: id, creation time in seconds, model."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> Identity:
        """A fresh identity, e.g. ``cmpl-5f0c...``."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)

    def fields(self) -> dict[str, Any]:
        """The identity as fields of a response or chunk."""
        return {"id": self.id, "created": self.created, "model": self.model}


def json_response(body: BaseModel) -> Response:
    """The successful answer of an endpoint."""
    return Response(body.model_dump_json(), media_type="application/json")
