"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from moe_engine.errors import InvalidRequestError
from moe_engine.server.body import StrictJsonRoute
from moe_engine.server.context import Context, Identity, ServerContext, json_response
from moe_engine.server.generation import Generation, collect, while_connected
from moe_engine.server.logprobs import CompletionLogprobsWriter, concatenate
from moe_engine.server.openapi import GENERATE_RESPONSES
from moe_engine.server.prompts import (
    Prompt,
    check_fits,
    check_stream_options,
    make_sampling_params,
)
from moe_engine.server.protocol.completions import (
    CompletionChoice,
    CompletionChunk,
    CompletionRequest,
    CompletionResponse,
)
from moe_engine.server.sse import EventStreamResponse, TextEvents
from moe_engine.types.results import CompletionOutput, FinishReason, PositionLogprobs
from moe_engine.types.sampling import SamplingParams

if TYPE_CHECKING:
    from moe_engine.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's

PromptPositions = tuple[PositionLogprobs | None, ...] | None

router = APIRouter(route_class=StrictJsonRoute)


@router.post("/v1/completions", response_model=CompletionResponse, responses=GENERATE_RESPONSES)
async def create_completion(
    body: CompletionRequest, request: Request, context: Context
) -> Response:
    """Continue one or several prompts."""
    context.check_ready()
    context.check_model(body.model)
    params = _sampling_params(body, context)
    prompts = await context.encoder.encode(
        body.prompt, add_special_tokens=body.add_special_tokens is not False
    )
    assert params.max_tokens is not None
    for prompt in prompts:
        check_fits(prompt, params.max_tokens, context.engine.info.max_model_len, param="prompt")

    identity = Identity.new("cmpl", context.model_name)
    writer = _ChoiceWriter(body, params, prompts, context.engine.tokenizer)
    generation = Generation(context.engine, context.metrics, identity.id, prompts, params)
    if body.stream:
        await while_connected(request, generation, generation.started())
        chunks = _stream(body, identity, generation, writer)
        return EventStreamResponse(chunks, generation.cancel)
    collected = await while_connected(
        request, generation, collect(generation, len(prompts), params.n)
    )
    return json_response(
        CompletionResponse(
            **identity.fields(),
            choices=[
                writer.whole(number, output, result.prompt_logprobs)
                for number, result in enumerate(collected)
                for output in result.outputs
            ],
            usage=generation.usage(count_output=not writer.score_only),
        )
    )


def _sampling_params(body: CompletionRequest, context: ServerContext) -> SamplingParams:
    """The sampling parameters; the engine is never asked for less than one token."""
    check_stream_options(body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequestError(
            f"best_of is {body.best_of}; it must equal n = {body.n or 1}", param="best_of"
        )
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequestError(
            "max_tokens is 0; without echo it must be at least 1", param="max_tokens"
        )
    return make_sampling_params(
        body,
        context.engine.default_sampling,
        context.engine.info,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else max(body.max_tokens, 1),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )


async def _stream(
    body: CompletionRequest, identity: Identity, generation: Generation, writer: _ChoiceWriter
) -> AsyncIterator[CompletionChunk | bytes]:
    plain = TextEvents(
        lambda index, text: CompletionChunk(
            **identity.fields(), choices=[CompletionChoice(index=index, text=text)]
        )
    )
    waiting: dict[int, list[CompletionOutput]] = {}  # deltas that come after their prompt's echo
    echoed: set[int] = set()
    async for number, output in generation:
        deltas = [*waiting.pop(number, []), *output.outputs]
        if body.echo and number not in echoed:
            if body.logprobs is not None and output.prompt_logprobs is None:
                waiting[number] = deltas
                continue
            echoed.add(number)
            for i in range(writer.n):
                choice = writer.echo(number, i, output.prompt_logprobs)
                yield CompletionChunk(**identity.fields(), choices=[choice])
        if writer.score_only:
            continue
        for delta in deltas:
            if delta.text and delta.logprobs is None and delta.finish_reason is None:
                yield plain.render(number * writer.n + delta.index, delta.text)
            elif delta.text or delta.logprobs or delta.finish_reason:
                choice = writer.delta(number, delta)
                yield CompletionChunk(**identity.fields(), choices=[choice])
    if body.stream_options is not None and body.stream_options.include_usage:
        usage = generation.usage(count_output=not writer.score_only)
        yield CompletionChunk(**identity.fields(), choices=[], usage=usage)


class _ChoiceWriter:
    """Turns what the engine says into choices: numbering, echo, log-probabilities.

    Attributes:
        n: choices per prompt.
        score_only: max_tokens is 0: the one token that the engine has to generate is left out.
    """

    def __init__(
        self,
        body: CompletionRequest,
        params: SamplingParams,
        prompts: list[Prompt],
        tokenizer: Tokenizer,
    ) -> None:
        self.n = params.n
        self.score_only = body.max_tokens == 0
        self._has_echo = bool(body.echo)
        self._has_logprobs = body.logprobs is not None
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._logprobs = [
            CompletionLogprobsWriter(tokenizer, params.skip_special_tokens)
            for _ in range(len(prompts) * params.n)
        ]

    def echo(self, number: int, i: int, positions: PromptPositions) -> CompletionChoice:
        """The prompt as the beginning of choice ``i`` of prompt ``number``."""
        prompt = self._prompts[number]
        text = prompt.text
        if text is None:
            text = self._tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
        index = number * self.n + i
        logprobs = None
        if self._has_logprobs:
            assert positions is not None, "the engine was asked for the prompt's log-probabilities"
            logprobs = self._logprobs[index].write_prompt(prompt.token_ids, positions)
        finish_reason = FinishReason.LENGTH if self.score_only else None
        return CompletionChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=finish_reason
        )

    def delta(self, number: int, delta: CompletionOutput) -> CompletionChoice:
        """What is new in a choice."""
        index = number * self.n + delta.index
        logprobs = None
        if self._has_logprobs:
            logprobs = self._logprobs[index].write_output(delta.logprobs or ())
        return CompletionChoice(
            index=index,
            text=delta.text,
            logprobs=logprobs,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )

    def whole(
        self, number: int, output: CompletionOutput, positions: PromptPositions
    ) -> CompletionChoice:
        """A complete choice."""
        if not self._has_echo:
            return self.delta(number, output)
        echo = self.echo(number, output.index, positions)
        if self.score_only:
            return echo
        choice = self.delta(number, output)
        choice.text = echo.text + choice.text
        if echo.logprobs is not None and choice.logprobs is not None:
            choice.logprobs = concatenate(echo.logprobs, choice.logprobs)
        return choice
