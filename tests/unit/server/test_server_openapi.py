"""The OpenAPI document, and a fuzz of everything that it promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from moe_engine.config import ServerConfig
from moe_engine.server.app import create_app
from tests.unit.server.conftest import MODEL
from tests.unit.server.fake_engine import FakeEngine


def make_app() -> FastAPI:
    """An application whose engine is ready without a lifespan."""
    engine = FakeEngine()
    engine.state = "ready"
    return create_app(engine, ServerConfig(served_model_name=MODEL))  # type: ignore[arg-type]


def make_fuzzed_app() -> FastAPI:
    """The same, with a document that knows the model's name: a guess would only ever see 404."""
    app = make_app()
    schemas = app.openapi()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        schemas[name]["properties"]["model"]["const"] = MODEL
    return app


DOCUMENT = make_app().openapi()
SEEN: Counter[tuple[str, int]] = Counter()  # (path, status) of fuzzed POSTs
schema = schemathesis.openapi.from_asgi("/openapi.json", make_fuzzed_app())


def fuzz(path: str) -> Callable[[], None]:
    """A test that requests of one path get what the document promises.

    One for each path, because schemathesis gives all that it makes of one function the same name,
    by which pytest-xdist shares tests out.
    """

    @schema.include(path=path).parametrize()
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def test(case: schemathesis.Case) -> None:
        response = case.call_and_validate(
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
                negative_data_rejection,
                unsupported_method,
            ]
        )
        if case.method == "POST":
            SEEN[case.path, response.status_code] += 1

    return test


test_fuzzed_completions = fuzz("/v1/completions")
test_fuzzed_chat_completions = fuzz("/v1/chat/completions")
test_fuzzed_models = fuzz("/v1/models")
test_fuzzed_model = fuzz("/v1/models/{model}")
test_fuzzed_health = fuzz("/health")
test_fuzzed_metrics = fuzz("/metrics")


def test_every_path_is_fuzzed() -> None:
    names = [name for name in globals() if name.startswith("test_fuzzed_")]
    assert len(DOCUMENT["paths"]) == len(names), DOCUMENT["paths"].keys()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_fuzz_was_no_blank(path):
    assert SEEN[path, 200] >= 5, SEEN
    assert SEEN[path, 400] >= 50, SEEN


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_failure_is_documented_as_an_error_object(path):
    responses = DOCUMENT["paths"][path]["post"]["responses"]
    assert set(responses) == {"200", "400", "404", "413", "415", "429", "500", "503"}
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    for status, response in responses.items():
        if status != "200":
            ref = response["content"]["application/json"]["schema"]["$ref"]
            assert ref == "#/components/schemas/ErrorResponse"


def test_frameworks_own_error_format_is_nowhere():
    assert "422" not in str(DOCUMENT["paths"])
    assert "HTTPValidationError" not in DOCUMENT["components"]["schemas"]


def test_requests_forbid_unknown_fields():
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        assert DOCUMENT["components"]["schemas"][name]["additionalProperties"] is False
