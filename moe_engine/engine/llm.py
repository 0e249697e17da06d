"""`MoEEngine`: the engine for scripts and notebooks."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

from moe_engine.engine.frontend import FrontEnd, News, OpenRequest, Prompt, make_config
from moe_engine.errors import InvalidRequestError
from moe_engine.text.tokenizer import Tokenizer
from moe_engine.types.messages import EngineReady, EngineStats
from moe_engine.types.results import RequestOutput
from moe_engine.types.sampling import SamplingParams


class MoEEngine:
    """Runs a Qwen3-MoE model on ``attention_tp * attention_dp`` ranks.

    The ranks are processes of their own, started without re-importing the calling script, so no
    ``if __name__ == "__main__"`` guard is needed and a notebook cell will do. Use it as a context
    manager, or call `shutdown`; at exit the ranks end in any case.

    Args:
        model: directory of a checkpoint or a Hugging Face repository id; None runs the
            embedded demo.
        attention_tp: ranks that share the attention heads of a token.
        attention_dp: groups of such ranks that hold different requests.
        device: ``auto``, ``cpu`` or ``cuda``.
        options: any other option of the engine, as ``python -m moe_engine.serve --help`` lists
            them but with underscores, e.g. ``max_model_len=4096``.

    Raises:
        ConfigError, CheckpointError: the engine cannot be started as asked.
        EngineDeadError: a rank failed while starting.

    Example:
        >>> with MoEEngine() as engine:
        ...     [result] = engine.generate("Once upon a time", SamplingParams(max_tokens=8))
        ...     print(result.outputs[0].text)
    """

    def __init__(
        self,
        model: str | None = None,
        attention_tp: int = 1,
        attention_dp: int = 1,
        device: str = "auto",
        **options: Any,
    ) -> None:
        config = make_config(model, attention_tp, attention_dp, device, options)
        self._front_end = FrontEnd(config)
        self._front_end.start()
        self._request_numbers = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Stop the ranks. Safe to call twice."""
        self._front_end.client.shutdown()

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self._front_end.tokenizer

    @property
    def info(self) -> EngineReady:
        """The engine's limits."""
        return self._front_end.client.info

    @property
    def stats(self) -> EngineStats:
        """The engine's latest counters."""
        return self._front_end.client.stats

    @property
    def default_params(self) -> SamplingParams:
        """The parameters that the checkpoint's ``generation_config.json`` recommends."""
        return self._front_end.default_params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many together; returns one result per prompt, in order.

        Args:
            prompts: a `Prompt` or a sequence of them.
            params: for all prompts, or one per prompt; None takes `default_params`.

        Raises:
            InvalidRequestError: a prompt cannot be served; the whole call is aborted.
            EngineDeadError: a rank failed.
        """
        batch = as_batch(prompts)
        params = params or self.default_params
        each = [params] * len(batch) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(batch):
            raise InvalidRequestError(
                f"{len(each)} sampling parameters for {len(batch)} prompts", param="params"
            )
        news: queue.SimpleQueue[tuple[int, News]] = queue.SimpleQueue()
        requests = []
        try:
            for number, (prompt, own_params) in enumerate(zip(batch, each, strict=True)):

                def put(item: News, number: int = number) -> None:
                    news.put((number, item))

                requests.append(self._open(prompt, own_params, put))
            num_open = len(requests)
            while num_open:
                number, item = news.get()
                was_open = not requests[number].finished
                requests[number].handle(item)
                num_open -= was_open and requests[number].finished
        finally:
            for request in requests:
                request.abort()
        return [request.assembler.final() for request in requests]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt piece by piece; each output holds what is new since the last.

        Leaving the loop early aborts the request. Raises as `generate`.
        """
        news: queue.SimpleQueue[News] = queue.SimpleQueue()
        request = self._open(prompt, params or self.default_params, news.put)
        try:
            while not request.finished:
                output = request.handle(news.get())
                if output is not None:
                    yield output
        finally:
            request.abort()

    def _open(
        self, prompt: Prompt, params: SamplingParams, put: Callable[[News], None]
    ) -> OpenRequest:
        request_id = f"request-{next(self._request_numbers)}"
        return self._front_end.open(request_id, self._front_end.token_ids(prompt), params, put)


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts as a list, be they one or many; what is none `FrontEnd.token_ids` refuses."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        return [prompts]
    batch = prompts if isinstance(prompts, Sequence) else list(prompts)
    is_single = len(batch) > 0 and isinstance(batch[0], int | Mapping)
    return cast("list[Prompt]", [batch] if is_single else list(batch))
