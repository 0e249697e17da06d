"""What a user may ask of the sampler, checked as soon as it is said."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from moe_engine.errors import InvalidRequestError

INT32_MAX = 2**31 - 1
MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to turn logits into tokens for one request.

    Names and defaults follow vLLM's ``SamplingParams``; values of a wrong type or out
    of range raise `InvalidRequestError` naming the field, the value and the limit. Integer fields
    without a limit of their own end at 2**31 - 1, so that they fit the wire and the kernels.

    Attributes:
        n: independent completions of the same prompt.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keep this many most likely tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than ``min_p`` times the most likely one.
        presence_penalty, frequency_penalty: OpenAI's, over output tokens, in [-2, 2].
        repetition_penalty: Hugging Face's, over prompt and output tokens, > 0; 1 is off.
        seed: makes the request reproducible; None draws a fresh one.
        stop: strings that end the output; one string alone may be given as it is.
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
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        _set(self, "stop", _as_tuple("stop", stop, "a string or a sequence of strings"))
        _set(
            self,
            "stop_token_ids",
            _as_tuple("stop_token_ids", self.stop_token_ids, "a sequence of ints"),
        )
        _check_integer("n", self.n, 1, MAX_N)
        self._check_number("temperature", 0.0, 2.0)
        self._check_number("top_p", 0.0, 1.0, open_low=True)
        _check_integer("top_k", self.top_k, -1, INT32_MAX)
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("presence_penalty", -2.0, 2.0)
        self._check_number("frequency_penalty", -2.0, 2.0)
        self._check_number("repetition_penalty", 0.0, 10.0, open_low=True)
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1, INT32_MAX)
        most = INT32_MAX if self.max_tokens is None else self.max_tokens
        _check_integer("min_tokens", self.min_tokens, 0, most)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "be True or False")
        self._check_stops()
        self._check_logit_bias()

    def _check_number(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        number = _checked_number(name, getattr(self, name), low, high, open_low=open_low)
        _set(self, name, number)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop has {len(self.stop)} strings; the limit is {MAX_STOP_STRINGS}", param="stop"
            )
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidRequestError(
                    f"stop string {_shown(text)} must be a string of 1 to "
                    f"{MAX_STOP_STRING_CHARS} characters",
                    param="stop",
                )
        for index, token_id in enumerate(self.stop_token_ids):
            _check_integer(f"stop_token_ids item {index}", token_id, 0, INT32_MAX)

    def _check_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, dict):
            _refuse("logit_bias", self.logit_bias, "be a dict from token ids to numbers")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(
                f"logit_bias has {len(self.logit_bias)} entries; the limit is {MAX_LOGIT_BIAS}",
                param="logit_bias",
            )
        biases = {}
        for token_id, bias in self.logit_bias.items():
            _check_integer("logit_bias key", token_id, 0, INT32_MAX)
            biases[token_id] = _checked_number(
                f"logit_bias of token {token_id}", bias, -100.0, 100.0
            )
        _set(self, "logit_bias", biases)

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


def _set(params: SamplingParams, name: str, value: Any) -> None:
    """Put a checked value into the frozen dataclass."""
    object.__setattr__(params, name, value)


def _as_tuple(name: str, values: Any, kind: str) -> tuple[Any, ...]:
    """The items of a list or another iterable, whose types are still to be checked."""
    if not isinstance(values, Iterable):
        _refuse(name, values, f"be {kind}")
    return tuple(values)


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    """Raise unless ``value`` is an integer (no bool, no 2.0) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _refuse(name, value, f"be an integer in [{low}, {high}]")


def _checked_number(
    name: str, value: Any, low: float, high: float, *, open_low: bool = False
) -> float:
    """``value`` as a float, if it is a number in [low, high] (in (low, high] if ``open_low``).

    The wire takes no subclass of float, such as NumPy's.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Python compares an int of any size with a float exactly, and nan is never inside.
    if not is_number or not low <= value <= high or (open_low and value == low):
        _refuse(name, value, f"be a number in {'(' if open_low else '['}{low}, {high}]")
    return float(value)


def _refuse(name: str, value: object, requirement: str) -> NoReturn:
    raise InvalidRequestError(
        f"{name} is {_shown(value)}; it must {requirement}", param=name.split()[0]
    )


def _shown(value: object) -> str:
    """A value for an error message, cut short."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"  # Python prints none of many digits
    return f"{value!r:.80}"
