"""What a user may ask of the sampler, checked as soon as it is said."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moe_engine.errors import InvalidRequestError

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to turn logits into tokens for one request.

    Names and defaults follow vLLM's ``SamplingParams``; values out of range raise
    `InvalidRequestError` naming the field, the value and the limit.

    Attributes:
        n: independent completions of the same prompt.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keep this many most likely tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than ``min_p`` times the most likely one.
        presence_penalty, frequency_penalty: OpenAI's, over output tokens, in [-2, 2].
        repetition_penalty: Hugging Face's, over prompt and output tokens, > 0; 1 is off.
        seed: makes the request reproducible; None draws a fresh one.
        stop: strings that end the output.
        stop_token_ids: token ids that end the output (besides the model's eos ids).
        ignore_eos: do not end at the model's eos ids.
        max_tokens: most output tokens; None lets the context length decide.
        min_tokens: eos and ``stop_token_ids`` cannot be sampled before this many output tokens.
        logprobs: how many alternatives to report for every output token; None reports nothing.
        prompt_logprobs: the same for every prompt token.
        logit_bias: added to the logits of these token ids, each in [-100, 100].
        include_stop_str_in_output: keep the matched stop string in the text.
        skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check_range("n", self.n, 1, MAX_N)
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("top_k", self.top_k, -1, None)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, None)
        _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        self._check_stops()
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(
                f"logit_bias has {len(self.logit_bias)} entries; the limit is {MAX_LOGIT_BIAS}",
                param="logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop has {len(self.stop)} strings; the limit is {MAX_STOP_STRINGS}", param="stop"
            )
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidRequestError(
                    f"stop string {text!r:.80} must be a string of 1 to "
                    f"{MAX_STOP_STRING_CHARS} characters",
                    param="stop",
                )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `InvalidRequestError` for a token id outside ``[0, vocab_size)``."""
        for name, token_ids in (
            ("logit_bias", tuple(self.logit_bias)),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise InvalidRequestError(
                        f"{name} names token id {token_id}; the vocabulary has ids "
                        f"0 to {vocab_size - 1}",
                        param=name,
                    )


def _check_range(
    name: str, value: float, low: float, high: float | None, *, open_low: bool = False
) -> None:
    """Raise unless ``value`` is a finite number in [low, high] (or (low, high] if ``open_low``)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = is_number and math.isfinite(value) and (value > low if open_low else value >= low)
    if not inside or (high is not None and value > high):
        bracket = "(" if open_low else "["
        top = "inf)" if high is None else f"{high}]"
        raise InvalidRequestError(
            f"{name} is {value!r}; it must be in {bracket}{low}, {top}", param=name.split("[")[0]
        )
