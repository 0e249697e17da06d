"""The request fields that completions and chat completions share.

The bounds repeat those of `SamplingParams`, so that the OpenAPI document shows them; a test holds
the two together.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from moe_engine.server.protocol.base import StreamOptions, StrictModel
from moe_engine.types.sampling import (
    INT32_MAX,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
)

MAX_STOP_TOKEN_IDS = 1024

Penalty = Annotated[float, Field(ge=-2, le=2)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenCount = Annotated[int, Field(ge=0, le=INT32_MAX)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_STRING_CHARS)]
TokenIdKey = Annotated[str, Field(pattern="^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
JsonScalar = str | int | float | bool | None


class SamplingFields(StrictModel):
    """How to sample, when to stop, and how to deliver; null or absent takes the default."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: (
        StopString
        | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)]
        | None
    ) = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None
    ) = None
    ignore_eos: bool | None = None
    min_tokens: TokenCount | None = None
    logit_bias: Annotated[dict[TokenIdKey, Bias], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted; nothing depends on it.")

    def sampling_values(self) -> dict[str, Any]:
        """The fields that were given, under the names and types of `SamplingParams`."""
        values = {
            name: value
            for name in SamplingFields.model_fields
            if name not in ("model", "stream", "stream_options", "user")
            and (value := getattr(self, name)) is not None
        }
        if isinstance(self.stop, str):
            values["stop"] = (self.stop,)
        if self.logit_bias is not None:
            values["logit_bias"] = {int(key): bias for key, bias in self.logit_bias.items()}
        return values
