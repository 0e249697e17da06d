"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from moe_engine.errors import InvalidRequestError
from moe_engine.server.body import StrictJsonRoute
from moe_engine.server.context import Context, Identity, ServerContext, json_response
from moe_engine.server.generation import Generation, collect, while_connected
from moe_engine.server.logprobs import chat_logprobs
from moe_engine.server.openapi import GENERATE_RESPONSES
from moe_engine.server.prompts import (
    check_fits,
    check_stream_options,
    make_sampling_params,
)
from moe_engine.server.protocol.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatDelta,
    ChatLogprobs,
    ResponseMessage,
)
from moe_engine.server.sse import EventStreamResponse, TextEvents
from moe_engine.types.results import CompletionOutput
from moe_engine.types.sampling import SamplingParams

if TYPE_CHECKING:
    from moe_engine.text.tokenizer import Tokenizer

router = APIRouter(route_class=StrictJsonRoute)


@router.post(
    "/v1/chat/completions", response_model=ChatCompletionResponse, responses=GENERATE_RESPONSES
)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, context: Context
) -> Response:
    """Answer a conversation."""
    context.check_ready()
    context.check_model(body.model)
    check_stream_options(body)
    max_tokens = _max_tokens(body)
    prompt = await context.encoder.render_chat(body)
    max_model_len = context.engine.info.max_model_len
    check_fits(prompt, max_tokens or 1, max_model_len, param="messages")
    params = _sampling_params(body, context, max_tokens or max_model_len - len(prompt.token_ids))

    identity = Identity.new("chatcmpl", context.model_name)
    generation = Generation(context.engine, context.metrics, identity.id, [prompt], params)
    tokenizer = context.engine.tokenizer
    if body.stream:
        await while_connected(request, generation, generation.started())
        chunks = _stream(body, identity, generation, params.n, tokenizer)
        return EventStreamResponse(chunks, generation.cancel)
    (collected,) = await while_connected(request, generation, collect(generation, 1, params.n))
    return json_response(
        ChatCompletionResponse(
            **identity.fields(),
            choices=[_whole(output, tokenizer) for output in collected.outputs],
            usage=generation.usage(),
        )
    )


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    """The limit under its old or new name; None if neither is given."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequestError(
            f"max_tokens is {old} and max_completion_tokens is {new}; they are two names of one "
            "limit, give one of them",
            param="max_completion_tokens",
        )
    return old if new is None else new


def _sampling_params(
    body: ChatCompletionRequest, context: ServerContext, max_tokens: int
) -> SamplingParams:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError(
            f"top_logprobs is {body.top_logprobs}, but logprobs is not true", param="top_logprobs"
        )
    return make_sampling_params(
        body,
        context.engine.default_sampling,
        context.engine.info,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _whole(output: CompletionOutput, tokenizer: Tokenizer) -> ChatChoice:
    assert output.finish_reason is not None
    return ChatChoice(
        index=output.index,
        message=ResponseMessage(content=output.text),
        logprobs=_logprobs(output, tokenizer),
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
    )


async def _stream(
    body: ChatCompletionRequest,
    identity: Identity,
    generation: Generation,
    n: int,
    tokenizer: Tokenizer,
) -> AsyncIterator[ChatCompletionChunk | bytes]:
    plain = TextEvents(
        lambda index, text: ChatCompletionChunk(
            **identity.fields(),
            choices=[ChatChunkChoice(index=index, delta=ChatDelta(content=text))],
        )
    )
    for index in range(n):
        choice = ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
        yield ChatCompletionChunk(**identity.fields(), choices=[choice])
    async for _, output in generation:
        for part in output.outputs:
            if part.text and part.logprobs is None and part.finish_reason is None:
                yield plain.render(part.index, part.text)
                continue
            if not (part.text or part.logprobs or part.finish_reason):
                continue
            choice = ChatChunkChoice(
                index=part.index,
                delta=ChatDelta(content=part.text or None),
                logprobs=_logprobs(part, tokenizer),
                finish_reason=part.finish_reason,
                stop_reason=part.stop_reason,
            )
            yield ChatCompletionChunk(**identity.fields(), choices=[choice])
    if body.stream_options is not None and body.stream_options.include_usage:
        yield ChatCompletionChunk(**identity.fields(), choices=[], usage=generation.usage())


def _logprobs(output: CompletionOutput, tokenizer: Tokenizer) -> ChatLogprobs | None:
    return None if output.logprobs is None else chat_logprobs(tokenizer, output.logprobs)
