"""The documented bounds are those of `SamplingParams`."""

from __future__ import annotations

from typing import Any

import pytest

from moe_engine.errors import InvalidRequestError
from moe_engine.server.protocol.completions import CompletionRequest
from moe_engine.types.sampling import SamplingParams


def numeric_bounds() -> list[tuple[str, float, bool]]:
    """(field, value at or just beyond a documented bound, whether the bound allows it)."""
    cases = []
    for name, info in CompletionRequest.model_json_schema()["properties"].items():
        if name in ("max_tokens", "best_of"):
            continue
        for schema in info.get("anyOf", [info]):
            step = 1 if schema.get("type") == "integer" else 1e-6
            for key, sign in (("minimum", -1), ("maximum", 1)):
                if key in schema:
                    cases.append((name, schema[key], True))
                    cases.append((name, schema[key] + sign * step, False))
            if "exclusiveMinimum" in schema:
                cases.append((name, schema["exclusiveMinimum"], False))
                cases.append((name, schema["exclusiveMinimum"] + step, True))
    return cases


def test_bounds_are_documented_for_every_numeric_field():
    assert {name for name, _, _ in numeric_bounds()} == {
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "min_tokens",
        "logprobs",
    }


@pytest.mark.parametrize(("name", "value", "is_allowed"), numeric_bounds())
def test_documented_bound_is_the_samplers(name: str, value: Any, is_allowed: bool):
    if is_allowed:
        SamplingParams(**{name: value})
    else:
        with pytest.raises(InvalidRequestError):
            SamplingParams(**{name: value})


def test_every_sampling_parameter_can_be_asked_for():
    fields = set(SamplingParams.__dataclass_fields__) - {"prompt_logprobs"}  # echo asks for them
    assert fields <= set(CompletionRequest.model_fields)
