"""What all requests and replies share: strictness, refusal of single values, errors, usage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class StrictModel(BaseModel):
    """A part of a request: wrong types and unknown fields are refused, never coerced or dropped."""

    model_config = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, eq=False)
class Only:
    """Annotation for a feature that is not offered: a field that takes just its harmless values."""

    allowed: tuple[Any, ...]

    def check(self, value: Any) -> Any:
        """Return ``value`` if it is one of ``allowed`` in type and value, raise otherwise."""
        if any(type(value) is type(harmless) and value == harmless for harmless in self.allowed):
            return value
        raise PydanticCustomError(
            "not_supported",
            "Not supported by this server; the only values accepted are: {allowed}",
            {"allowed": ", ".join(map(json.dumps, self.allowed))},
        )

    def __get_pydantic_core_schema__(self, _: Any, __: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> Any:
        return {"enum": list(self.allowed)}


def absent_if_none() -> Any:
    """A reply's field that is left out, rather than null, when there is nothing to say."""
    return Field(None, exclude_if=lambda value: value is None)


class StreamOptions(StrictModel):
    """What a stream tells besides the choices."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class PromptTokensDetails(BaseModel):
    """Where the prompt's KV came from."""

    cached_tokens: int


class UsageInfo(BaseModel):
    """Token counts of one HTTP request, over all its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ErrorObject(BaseModel):
    """OpenAI's description of a failure."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer whose status is 4xx or 5xx."""

    error: ErrorObject


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["moe_engine"] = "moe_engine"
    max_model_len: int


class ModelList(BaseModel):
    """Every served model."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class HealthReport(BaseModel):
    """Whether requests can be served now, and if not, why."""

    status: Literal["ready", "starting", "dead"]
    reason: str | None = None
