"""POST /v1/completions: request, response, chunk."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from moe_engine.server.protocol.base import (
    Only,
    UsageInfo,
    absent_if_none,
)
from moe_engine.server.protocol.sampling import (
    INT32_MAX,
    NumLogprobs,
    SamplingFields,
    TokenCount,
)
from moe_engine.types.results import FinishReason
from moe_engine.types.sampling import MAX_N

MAX_PROMPTS = 2048


def split_prompts(value: Any) -> list[str | list[int]]:
    """Bring OpenAI's four shapes of ``prompt`` to a list with one text or id list per prompt.

    Stops at the first bad element: a union type would report every element once per member.
    """
    if isinstance(value, str):
        return [_checked_text(value, "")]
    if not isinstance(value, list):
        raise _bad_prompt(
            "a string, a list of strings, a list of token ids or a list of those", "", value
        )
    if not value:
        raise _bad_prompt("at least one prompt or token id", "", value)
    if isinstance(value[0], int):
        return [_checked_ids(value, "")]
    if len(value) > MAX_PROMPTS:
        raise _bad_prompt(f"at most {MAX_PROMPTS} prompts, not {len(value)}", "", value)
    if isinstance(value[0], str):
        return [_checked_text(text, f"[{i}]") for i, text in enumerate(value)]
    return [_checked_ids(ids, f"[{i}]") for i, ids in enumerate(value)]


def _checked_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _bad_prompt("a string, like the elements before it", where, value)
    if not value:
        raise _bad_prompt("text, not an empty string", where, value)
    return value


def _checked_ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list):
        raise _bad_prompt("a list of token ids", where, value)
    if not value:
        raise _bad_prompt("at least one token id", where, value)
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= INT32_MAX:
        return value
    for i, token_id in enumerate(value):
        if type(token_id) is not int or not 0 <= token_id <= INT32_MAX:
            raise _bad_prompt("a token id, an integer from 0 on", f"{where}[{i}]", token_id)
    return value


def _bad_prompt(needed: str, where: str, value: Any) -> PydanticCustomError:
    """An error about ``value``, which lies at ``where`` in the prompt, e.g. ``[3][0]``."""
    context = {"where": where, "needed": needed, "value": value}
    return PydanticCustomError("bad_prompt", "Input should be {needed}", context)


_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_IDS_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": INT32_MAX},
    "minItems": 1,
}
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(split_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT_SCHEMA,
                _IDS_SCHEMA,
                *(
                    {"type": "array", "items": one, "minItems": 1, "maxItems": MAX_PROMPTS}
                    for one in (_TEXT_SCHEMA, _IDS_SCHEMA)
                ),
            ]
        }
    ),
]


class CompletionRequest(SamplingFields):
    """OpenAI's request plus vLLM's sampling fields."""

    prompt: Prompts
    suffix: Annotated[None, Only((None,))] = None
    echo: bool | None = None
    max_tokens: TokenCount | None = Field(
        None, description="Null: 16. 0, with echo: only score the prompt."
    )
    logprobs: NumLogprobs | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = Field(
        None, description="Must equal n: this server returns all that it samples."
    )
    add_special_tokens: bool | None = None


class CompletionLogprobs(BaseModel):
    """Per token, in order: its text, log-probability, alternatives and place in the text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(BaseModel):
    """One completion, or in a stream what is new in it; index is prompt number * n + i."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class CompletionResponse(BaseModel):
    """All completions of a request."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[CompletionChoice]
    usage: UsageInfo


class CompletionChunk(BaseModel):
    """One streamed event; ``usage`` appears only with ``stream_options.include_usage``."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[CompletionChoice]
    usage: UsageInfo | None = absent_if_none()
