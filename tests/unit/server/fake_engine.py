"""An engine without a model: it has `AsyncMoEEngine`'s interface and writes a fixed text.

One token is one byte; ids from 256 on are special tokens. The output of choice ``i`` is `TEXT`
repeated, rotated by ``i`` bytes. Knobs on the instance make it slow, dying, or refusing.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from moe_engine.errors import EngineDeadError, InvalidRequestError
from moe_engine.types.messages import EngineReady, EngineStats
from moe_engine.types.results import (
    CompletionOutput,
    FinishReason,
    PositionLogprobs,
    RequestOutput,
    TokenLogprob,
    Usage,
)
from moe_engine.types.sampling import SamplingParams

TEXT = "Schöne Grüße 🙂, "
EOS = 256
VOCAB_SIZE = 260


class FakeTokenizer:
    """Bytes as tokens; ids 256 to 259 are special."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if not (skip_special_tokens and self.is_special(i))]
        return b"".join(self.token_bytes(i) or b"" for i in kept).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes | None:
        if token_id >= VOCAB_SIZE:
            return None
        return f"<|{token_id}|>".encode() if self.is_special(token_id) else bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return (self.token_bytes(token_id) or b"").decode(errors="replace")

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        /,
        tools: None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        if messages[-1]["content"] == "refuse me":
            raise InvalidRequestError("the template refuses this", param="messages")
        text = "".join(f"{m['role']}:{m['content']}\n" for m in messages)
        text += "".join(f"{key}={value}\n" for key, value in sorted(kwargs.items()))
        return self.encode(text + "assistant:" * add_generation_prompt)


class FakeEngine:
    """See the module's docstring.

    Attributes:
        delay_s: pause before every token.
        die_after: the engine dies when a request has this many tokens.
        start_error: raised by `start` instead of becoming ready.
        refusal: raised by every `generate`.
        hold_start: `start` waits until this is set.
        active, aborted, seen: running requests, ids of aborted ones, (prompt, params) of all.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config
        self.state = "starting"
        self.info = EngineReady(64, VOCAB_SIZE, 10, 16, [EOS], "fake")
        self.stats = EngineStats(num_running=3, num_blocks=10, num_free_blocks=4)
        self.tokenizer = FakeTokenizer()
        self.default_sampling: dict[str, float | int] = {"temperature": 0.6, "top_k": 20}
        self.start_error: Exception | None = None
        self.hold_start: asyncio.Event | None = None
        self.was_shut_down = False
        self.reset()

    def reset(self) -> None:
        """Forget requests, deaths and refusals, so that the next test finds a fresh engine."""
        self.error: EngineDeadError | None = None
        self.died = asyncio.Event()
        self.stopped = asyncio.Event()
        self.delay_s = 0.0
        self.die_after: int | None = None
        self.refusal: Exception | None = None
        self.active: set[str] = set()
        self.aborted: list[str] = []
        self.seen: list[tuple[list[int], SamplingParams]] = []

    async def start(self) -> None:
        if self.hold_start is not None:
            await self.hold_start.wait()
        if self.start_error is not None:
            self.state = "dead"
            raise self.start_error
        self.state = "ready"

    async def shutdown(self) -> None:
        self.was_shut_down = True
        self.state = "dead"
        self.stopped.set()

    def die(self, reason: str = "rank 3 was killed") -> None:
        self.error = EngineDeadError(reason, rank=3, details="Traceback: secret")
        self.state = "dead"
        self.died.set()

    async def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, request_id: str
    ) -> AsyncIterator[RequestOutput]:
        self.seen.append((prompt_token_ids, params))
        if self.refusal is not None:
            raise self.refusal
        self.active.add(request_id)
        completed = False
        try:
            async for output in self._outputs(prompt_token_ids, params, request_id):
                yield output
            completed = True
        finally:
            self.active.discard(request_id)
            if not completed:
                self.aborted.append(request_id)

    async def _outputs(
        self, prompt: list[int], params: SamplingParams, request_id: str
    ) -> AsyncIterator[RequestOutput]:
        data = TEXT.encode()
        assert params.max_tokens is not None
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(params.n)]
        for step in range(params.max_tokens):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), self.delay_s)
                raise EngineDeadError("the engine was shut down")
            if self.die_after is not None and step >= self.die_after:
                self.die()
            if self.error is not None:
                raise self.error
            last = step == params.max_tokens - 1
            # The last choice comes first: nothing may rely on their order.
            for index in reversed(range(params.n)):
                token_id = data[(step + index) % len(data)]
                logprobs = None
                if params.logprobs is not None:
                    logprobs = (self._position(token_id, params.logprobs),)
                prompt_logprobs = None
                if params.prompt_logprobs is not None and index == 0 and step == 0:
                    entries = [self._position(i, params.prompt_logprobs) for i in prompt[1:]]
                    prompt_logprobs = (None, *entries)
                yield RequestOutput(
                    request_id=request_id,
                    prompt_token_ids=tuple(prompt),
                    outputs=(
                        CompletionOutput(
                            index=index,
                            text=decoders[index].decode(bytes([token_id]), last),
                            token_ids=(token_id,),
                            finish_reason=FinishReason.LENGTH if last else None,
                            logprobs=logprobs,
                        ),
                    ),
                    usage=Usage(len(prompt), (step + 1) * params.n, 2),
                    prompt_logprobs=prompt_logprobs,
                    finished=last and index == 0,
                )

    def _position(self, token_id: int, num_top: int) -> PositionLogprobs:
        """The token with log-probability -0.5, and the ids after it below that."""

        def entry(i: int, logprob: float, rank: int) -> TokenLogprob:
            return TokenLogprob(i, logprob, rank, self.tokenizer.token_text(i))

        tops = [(token_id + k) % 256 for k in range(num_top)]
        return PositionLogprobs(
            entry(token_id, -0.5, 1),
            tuple(entry(i, -0.5 - k, k + 1) for k, i in enumerate(tops)),
        )
