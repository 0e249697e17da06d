"""The endpoints that report: models, health, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from moe_engine.server.context import Context
from moe_engine.server.openapi import error_responses
from moe_engine.server.protocol.base import HealthReport, ModelCard, ModelList

router = APIRouter()
_UNAVAILABLE = error_responses(s503="The engine is loading or dead.")


@router.get("/v1/models", responses=_UNAVAILABLE)
async def list_models(context: Context) -> ModelList:
    """The one model that this server has."""
    context.check_ready()
    return ModelList(data=[context.model_card()])


@router.get(
    "/v1/models/{model:path}",
    responses={**error_responses(s404="Unknown model."), **_UNAVAILABLE},
)
async def retrieve_model(model: str, context: Context) -> ModelCard:
    """The model of that name; names may hold slashes."""
    context.check_ready()
    context.check_model(model)
    return context.model_card()


@router.get(
    "/health",
    response_model=HealthReport,
    responses={503: {"model": HealthReport, "description": "The engine is loading or dead."}},
)
async def health(context: Context) -> Response:
    """Whether requests can be served now."""
    state = context.engine.state
    report = HealthReport(status=state)
    if state == "dead":
        # Only the first line: what follows is the failed rank's traceback.
        report.reason = str(context.engine.error or "it could not start").partition("\n")[0]
    return JSONResponse(report.model_dump(), status_code=200 if state == "ready" else 503)


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"description": "Prometheus text exposition format"}},
)
async def metrics(context: Context) -> Response:
    """Counters, gauges and histograms for Prometheus."""
    return Response(context.metrics.render(), media_type=CONTENT_TYPE_LATEST)
