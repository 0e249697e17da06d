"""What the sync and the async API share: model directory, tokenizer, client, open requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from moe_engine.config import EngineConfig
from moe_engine.config.flat import build_config, flat_options
from moe_engine.config.hf import default_sampling, load_model_config
from moe_engine.dist.layout import check_layout
from moe_engine.engine.client import EngineClient
from moe_engine.engine.model_directory import resolve_model
from moe_engine.errors import ConfigError, EngineDeadError, InvalidRequestError, MoEEngineError
from moe_engine.log import get_logger
from moe_engine.text.no_tokenizer import NoTokenizer
from moe_engine.text.output import RequestAssembler
from moe_engine.text.tokenizer import Tokenizer
from moe_engine.types.messages import EngineReady, LoadProgress, RequestUpdate
from moe_engine.types.results import RequestOutput
from moe_engine.types.sampling import SamplingParams

logger = get_logger(__name__)

News = tuple[int, RequestUpdate | MoEEngineError]
"""Completion index and what the engine says of it."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or chat messages such as ``[{"role": "user", "content": "Hi"}]``."""


def make_config(
    model: str | None,
    attention_tp: int,
    attention_dp: int,
    device: str,
    options: Mapping[str, Any],
) -> EngineConfig:
    """The configuration behind the keyword arguments of `MoEEngine` and `AsyncMoEEngine`.

    Raises:
        ConfigError: unknown options, those of the server included, or values that cannot work.
    """
    known = flat_options()
    for name in options:
        if name in known and known[name].section == "server":
            raise ConfigError(f"{name} is an option of the HTTP server, which is not started here")
    values = {"attention_tp": attention_tp, "attention_dp": attention_dp, "device": device}
    if model is not None:
        values["model"] = str(model)
    config, _ = build_config({**values, **options})
    return config


class FrontEnd:
    """Everything between a user's prompt and the engine client.

    Attributes:
        tokenizer: the checkpoint's.
        default_sampling: the checkpoint's ``generation_config.json``, for parameters left out.
        client: the connection to the ranks.
    """

    tokenizer: Tokenizer

    def __init__(self, config: EngineConfig) -> None:
        directory = resolve_model(config.model)
        self.model_config = load_model_config(directory)
        check_layout(self.model_config, config.parallel)
        self.config = replace(config, model=str(directory))
        self.default_sampling: dict[str, Any] = default_sampling(directory)
        self.client = EngineClient(self.config)

    def start(
        self,
        on_death: Callable[[EngineDeadError], None] | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> EngineReady:
        """Start the ranks, and load the tokenizer meanwhile; see `EngineClient.start`."""
        assert self.config.model is not None
        with ThreadPoolExecutor(1) as pool:
            tokenizer = pool.submit(self._load_tokenizer, Path(self.config.model))
            info = self.client.start(on_death, on_progress)
        try:
            self.tokenizer = tokenizer.result()
        except BaseException:
            self.client.shutdown()
            raise
        return info

    def open(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        put: Callable[[News], None],
    ) -> OpenRequest:
        """Send a request to the engine; its news go to ``put``, from another thread.

        Raises:
            InvalidRequestError: a token id, here or in ``params``, is outside the vocabulary.
            EngineDeadError: the engine is dead.
        """
        if params.stop and self.config.skip_tokenizer_init:
            raise InvalidRequestError(
                "stop strings need a tokenizer, which skip_tokenizer_init leaves out; use "
                "stop_token_ids",
                param="stop",
            )
        vocab_size = self.client.info.vocab_size
        params.check_vocabulary(vocab_size)
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            position, token_id = next(
                (i, t) for i, t in enumerate(token_ids) if not 0 <= t < vocab_size
            )
            raise InvalidRequestError(
                f"prompt token id {token_id} at position {position} is outside the "
                f"vocabulary of ids 0 to {vocab_size - 1}",
                param="prompt",
            )
        return OpenRequest(self, request_id, token_ids, params, put)

    @property
    def default_params(self) -> SamplingParams:
        """The parameters that the checkpoint's ``generation_config.json`` recommends."""
        return SamplingParams(**self.default_sampling)

    def token_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of any kind of prompt; `InvalidRequestError` if it is none."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, Sequence):
            raise _no_prompt(prompt)
        if set(map(type, prompt)) == {int}:  # the usual case, without a look at each in Python
            return list(cast("Sequence[int]", prompt))
        token_ids, messages = [], []
        for item in prompt:
            if isinstance(item, Mapping):
                messages.append(item)
            elif isinstance(item, int) and not isinstance(item, bool):
                token_ids.append(item)
        if len(prompt) not in (len(token_ids), len(messages)):
            raise _no_prompt(prompt)
        return self.tokenizer.apply_chat_template(messages) if messages else token_ids

    def _load_tokenizer(self, directory: Path) -> Tokenizer:
        """The checkpoint's tokenizer; dummy weights can do with the demo's, or with none."""
        if self.config.skip_tokenizer_init:
            return NoTokenizer()
        try:
            return Tokenizer.from_directory(directory)
        except ConfigError as error:
            if self.config.load_format != "dummy":
                raise
            logger.warning("%s; with dummy weights the demo's tokenizer serves instead", error)
            return Tokenizer.from_directory(resolve_model(None))


class OpenRequest:
    """A user's request in the engine: ``n`` sequences and the assembly of their outputs.

    `handle` must be called with everything that arrives at ``put``, from one thread. If a sequence
    is refused while it is made, none of the others stays in the engine.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        put: Callable[[News], None],
    ) -> None:
        self._client = front_end.client
        self.assembler = RequestAssembler(request_id, front_end.tokenizer, params, token_ids)
        self._open = {index: f"{request_id}-{index}" for index in range(params.n)}
        for index, sequence_id in list(self._open.items()):

            def listener(news: RequestUpdate | MoEEngineError, index: int = index) -> None:
                put((index, news))

            try:
                self._client.submit(sequence_id, token_ids, nth_params(params, index), listener)
            except MoEEngineError:
                for number in range(index, params.n):  # these were never submitted
                    del self._open[number]
                self.abort()
                raise

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return not self._open

    def handle(self, news: News) -> RequestOutput | None:
        """Take in one piece of news; returns what the user may see of it, if anything.

        Raises:
            InvalidRequestError, EngineDeadError: what the engine answered; the rest is aborted.
        """
        index, update = news
        if index not in self._open:
            return None
        if isinstance(update, MoEEngineError):
            del self._open[index]
            self.abort()
            raise update
        output = self.assembler.update(index, update)
        completion = self.assembler.completions[index]
        if completion.finished:
            sequence_id = self._open.pop(index)
            if completion.stopped_by_string:
                self._client.abort(sequence_id)
        return output

    def abort(self) -> None:
        """Forget the completions that have not ended."""
        for sequence_id in self._open.values():
            self._client.abort(sequence_id)
        self._open.clear()


def nth_params(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of the ``index``-th of ``n`` completions: own seed, prompt scored once."""
    seed = params.seed
    if seed is not None:
        seed = (seed + index + 2**63) % 2**64 - 2**63
    prompt_logprobs = params.prompt_logprobs if index == 0 else None
    return replace(params, n=1, seed=seed, prompt_logprobs=prompt_logprobs)


def merge_news(items: list[News]) -> list[News]:
    """The same news with consecutive updates of one completion made one."""
    merged: list[News] = []
    for index, update in items:
        if merged and merged[-1][0] == index:
            before = merged[-1][1]
            if isinstance(before, RequestUpdate) and isinstance(update, RequestUpdate):
                merged[-1] = (index, _join(before, update))
                continue
        merged.append((index, update))
    return merged


def _join(first: RequestUpdate, second: RequestUpdate) -> RequestUpdate:
    """Two consecutive updates of a request as one; only the second can be the last."""
    assert first.finish_reason is None, "nothing comes after the last update"
    return RequestUpdate(
        second.request_id,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        finish_reason=second.finish_reason,
        stop_token_id=second.stop_token_id,
        num_cached_tokens=second.num_cached_tokens,
    )


def _no_prompt(prompt: object) -> InvalidRequestError:
    return InvalidRequestError(
        f"a prompt is a text, token ids or chat messages, but this one is {prompt!r:.200}",
        param="prompt",
    )
