"""`Generation`: the engine requests behind one HTTP request, tied to its client's presence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from moe_engine.server.errors import ClientDisconnected
from moe_engine.server.metrics import RequestTimer, ServerMetrics
from moe_engine.server.prompts import Prompt
from moe_engine.server.protocol.base import PromptTokensDetails, UsageInfo
from moe_engine.types.results import (
    CompletionOutput,
    PositionLogprobs,
    RequestOutput,
    Usage,
)
from moe_engine.types.sampling import SamplingParams

if TYPE_CHECKING:
    from moe_engine.engine.async_llm import AsyncMoEEngine

T = TypeVar("T")


class Generation:
    """Runs one engine request per prompt; iterating gives (prompt number, streamed output).

    Every engine request lives in a task of its own, so that `cancel` frees all of them at once
    whatever the consumer is doing. The first failure ends the iteration; whoever iterates cancels.
    """

    def __init__(
        self,
        engine: AsyncMoEEngine,
        metrics: ServerMetrics,
        request_id: str,
        prompts: Sequence[Prompt],
        params: SamplingParams,
    ) -> None:
        self._queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue()
        self._usage = [Usage()] * len(prompts)
        self._tasks = [
            asyncio.create_task(
                self._pump(
                    number,
                    engine.generate(prompt.token_ids, params, f"{request_id}-{number}"),
                    RequestTimer(metrics),
                )
            )
            for number, prompt in enumerate(prompts)
        ]
        self._first: tuple[int, RequestOutput] | Exception | None = None

    async def _pump(
        self, number: int, outputs: AsyncIterator[RequestOutput], timer: RequestTimer
    ) -> None:
        try:
            async for output in outputs:
                timer.observe(output)
                self._usage[number] = output.usage
                self._queue.put_nowait((number, output))
        except asyncio.CancelledError:
            timer.aborted()
            raise
        except Exception as error:
            self._queue.put_nowait(error)
        else:
            self._queue.put_nowait(None)

    async def started(self) -> None:
        """Wait for the first output; raises what the engine raised instead of one.

        A stream calls it before it commits to status 200.
        """
        self._first = await self._queue.get()
        if isinstance(self._first, Exception):
            raise self._first

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        num_open = len(self._tasks)
        item = self._first or await self._queue.get()
        while True:
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
                if num_open == 0:
                    return
            else:
                yield item
            item = await self._queue.get()

    def cancel(self) -> None:
        """Abort what still runs in the engine; harmless when everything has ended."""
        for task in self._tasks:
            task.cancel()

    def usage(self, *, count_output: bool = True) -> UsageInfo:
        """Token counts so far, over all prompts; the output's only if the client gets it."""
        num_prompt = sum(usage.prompt_tokens for usage in self._usage)
        num_output = sum(usage.completion_tokens for usage in self._usage) * count_output
        return UsageInfo(
            prompt_tokens=num_prompt,
            completion_tokens=num_output,
            total_tokens=num_prompt + num_output,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(usage.cached_tokens for usage in self._usage)
            ),
        )


@dataclass(frozen=True)
class CollectedPrompt:
    """Whole completions of one prompt, and its own log-probabilities if they were asked for."""

    outputs: list[CompletionOutput]
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None


async def collect(generation: Generation, num_prompts: int, n: int) -> list[CollectedPrompt]:
    """Wait for the whole of every completion."""
    deltas: list[list[list[CompletionOutput]]] = [
        [[] for _ in range(n)] for _ in range(num_prompts)
    ]
    prompt_logprobs: list[tuple[PositionLogprobs | None, ...] | None] = [None] * num_prompts
    async for number, output in generation:
        prompt_logprobs[number] = prompt_logprobs[number] or output.prompt_logprobs
        for delta in output.outputs:
            deltas[number][delta.index].append(delta)
    return [
        CollectedPrompt([_join(parts) for parts in outputs], positions)
        for outputs, positions in zip(deltas, prompt_logprobs, strict=True)
    ]


def _join(deltas: list[CompletionOutput]) -> CompletionOutput:
    """One completion from all its deltas; the last one tells why it ended."""
    last = deltas[-1]
    logprobs = tuple(position for delta in deltas for position in delta.logprobs or ())
    return CompletionOutput(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=None if last.logprobs is None else logprobs,
    )


async def while_connected(
    request: Request, generation: Generation, work: Coroutine[Any, Any, T]
) -> T:
    """The result of ``work``; on any failure, or when the client leaves, the generation is freed.

    Raises:
        ClientDisconnected: the client closed the connection first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    succeeded = False
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        result = task.result()
        succeeded = True
        return result
    finally:
        task.cancel()
        watcher.cancel()
        if not succeeded:
            generation.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
