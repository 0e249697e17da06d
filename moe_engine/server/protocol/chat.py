"""POST /v1/chat/completions: messages, request, response, chunk."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from moe_engine.server.protocol.base import (
    Only,
    StrictModel,
    UsageInfo,
    absent_if_none,
)
from moe_engine.server.protocol.sampling import (
    INT32_MAX,
    JsonScalar,
    NumLogprobs,
    SamplingFields,
)
from moe_engine.types.results import FinishReason


class TextPart(StrictModel):
    """A piece of text; images, audio and files are refused by their type."""

    type: Annotated[Literal["text"], Only(("text",))]
    text: str


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]


class SystemMessage(StrictModel):
    """Instructions; the developer role is an alias of system."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(StrictModel):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class FunctionCall(StrictModel):
    """A function with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(StrictModel):
    """An earlier call, as part of the history."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(StrictModel):
    """An earlier answer, in the shape in which clients got it."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    function_call: Annotated[None, Only((None,))] = None
    refusal: Annotated[None, Only((None,))] = None
    audio: Annotated[None, Only((None,))] = None
    annotations: Annotated[list[Any] | None, Only((None, []))] = None


class ToolMessage(StrictModel):
    """The result of an earlier call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = None
    name: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class ResponseFormat(StrictModel):
    """Only free text is offered."""

    type: Annotated[Literal["text"], Only(("text",))]


class ChatCompletionRequest(SamplingFields):
    """OpenAI's request plus vLLM's sampling and template fields."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = Field(
        None, description="The newer name of max_tokens. Both null: the rest of the context."
    )
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, JsonScalar] | None = Field(
        None, description="Variables of the chat template, e.g. enable_thinking."
    )
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any] | None, Only((None, []))] = None
    tool_choice: Annotated[str | None, Only((None, "none"))] = None
    functions: Annotated[list[Any] | None, Only((None, []))] = None
    function_call: Annotated[str | None, Only((None, "none"))] = None
    modalities: Annotated[list[str] | None, Only((None, ["text"]))] = None
    audio: Annotated[None, Only((None,))] = None
    prediction: Annotated[None, Only((None,))] = None
    web_search_options: Annotated[None, Only((None,))] = None
    reasoning_effort: Annotated[None, Only((None,))] = None
    verbosity: Annotated[None, Only((None,))] = None
    store: Annotated[bool | None, Only((None, False))] = None
    service_tier: Annotated[str | None, Only((None, "auto", "default"))] = None
    parallel_tool_calls: bool | None = Field(None, description="No tools, so nothing depends on it")
    metadata: dict[str, str] | None = Field(None, description="Accepted; nothing depends on it.")
    safety_identifier: str | None = Field(None, description="Accepted; nothing depends on it.")
    prompt_cache_key: str | None = Field(
        None, description="Accepted; the prefix cache finds shared prefixes by itself."
    )


class TokenLogprobEntry(BaseModel):
    """A token, its log-probability, and its UTF-8 bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class PositionLogprobEntry(TokenLogprobEntry):
    """The chosen token of a position and the most likely ones."""

    top_logprobs: list[TokenLogprobEntry]


class ChatLogprobs(BaseModel):
    """One entry per output token."""

    content: list[PositionLogprobEntry]
    refusal: None = None


class ResponseMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the n answers."""

    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: str | int | None = None


class ChatCompletionResponse(BaseModel):
    """All answers of a request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChoice]
    usage: UsageInfo


class ChatDelta(BaseModel):
    """What is new in a streamed answer; the role comes once, in the first chunk."""

    role: Literal["assistant"] | None = absent_if_none()
    content: str | None = absent_if_none()


class ChatChunkChoice(BaseModel):
    """A streamed choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class ChatCompletionChunk(BaseModel):
    """One streamed event; ``usage`` appears only with ``stream_options.include_usage``."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChunkChoice]
    usage: UsageInfo | None = absent_if_none()
