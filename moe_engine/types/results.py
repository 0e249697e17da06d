"""What a user gets back: texts, token ids, logprobs, usage."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why an output ended; ``stop`` and ``length`` are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token at one position, before temperature and penalties.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability under the raw logits.
        rank: 1 for the most likely token of the position.
        text: the token decoded alone (may hold U+FFFD where a character spans tokens).
    """

    token_id: int
    logprob: float
    rank: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The chosen token and the most likely alternatives at one position.

    Attributes:
        chosen: the token that stands in the sequence.
        top: the ``logprobs`` most likely tokens, best first (may hold the chosen one).
    """

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the ``n`` completions of a request.

    In a stream, ``text``, ``token_ids`` and ``logprobs`` hold what is new since the last
    chunk; in a final result they hold everything.

    Attributes:
        index: which of the ``n`` completions, from 0.
        finish_reason: None while the output goes on.
        stop_reason: the stop string or stop token id that ended it, if any.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[PositionLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request; ``cached_tokens`` of the prompt came from the prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The state of one request: the whole of it, or one streamed chunk.

    Attributes:
        request_id: the id under which the request was submitted.
        prompt_token_ids: the prompt as the model saw it.
        outputs: one entry per completion (in a stream only those that have news).
        usage: token counts so far, over all completions.
        prompt_logprobs: one entry per prompt token, the first is None; None unless asked for.
        finished: True in the last output of the request.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: Usage = field(default_factory=Usage)
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finished: bool = False
