"""Who attends to which of a step's prefill spans on a GPU with Triton, where our kernel for Hopper
(`ops.prefill_attention`) does not take them.

Where a whole prompt is computed at once cuDNN is faster than our Triton kernel (on an H200; other
GPUs have not been measured), but it builds a plan for every new shape, which takes a while on the
host. So it gets only long prompts, filled up to a multiple of `PAD`, and batches of equal prompts;
a server then meets a few dozen shapes. Our Triton kernel takes the rest: chunks with a context
before them, short prompts, and caches that are not in the queries' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

# Shorter prompts go to the Triton kernel.
MIN_PROMPT = 1024
# Prompts are filled up to a multiple: at most a quarter more work for the shortest.
PAD = 256
# Equal prompts in one call: a shape of their own, so only where it is likely to come again.
MIN_EQUAL_PROMPT = 256
MIN_EQUAL_TOKENS = 4096
EQUAL_MULTIPLE = 64


class Implementation(Enum):
    """Who attends to a group of spans."""

    CUDNN = "cudnn"
    TRITON = "triton"


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """A sequence that computes several positions in a step.

    Attributes:
        first_row: its first row among the T tokens of the step.
        query_len: rows of this step; they are the last positions of its context.
        context_len: tokens in the cache once this step's are written.
    """

    first_row: int
    query_len: int
    context_len: int


@dataclass(frozen=True, slots=True)
class PrefillGroup:
    """Spans that follow one another and go into one call.

    Attributes:
        first, num_spans: which of the step's prefill spans.
        padded_len: for cuDNN, rows of each span in the call; 0 for Triton.
        reason: why this implementation, for people.
    """

    first: int
    num_spans: int
    implementation: Implementation
    padded_len: int
    reason: str


def plan_prefills(spans: Sequence[PrefillSpan], cudnn: bool) -> list[PrefillGroup]:
    """Cut the spans into groups, in order.

    Args:
        spans: the step's prefill spans; their rows follow one another.
        cudnn: whether cuDNN can attend to queries and caches of this kind.

    Example: prompts of 512, 512, ... (16 of them), 300 and 5000 tokens, all computed at once, make
    three groups: cuDNN with 16 spans, Triton with one, cuDNN with one filled up to 5120 rows.
    """
    groups: list[PrefillGroup] = []
    index = 0
    for query_len, whole, num_spans in _runs(spans):
        multiple = query_len % EQUAL_MULTIPLE == 0
        if not cudnn:
            new = [_triton(index, num_spans, "cuDNN cannot")]
        elif not whole:
            new = [_triton(index, num_spans, "context before the span")]
        elif (
            num_spans > 1
            and query_len >= MIN_EQUAL_PROMPT
            and query_len * num_spans >= MIN_EQUAL_TOKENS
            and multiple
        ):
            new = [
                PrefillGroup(
                    index, num_spans, Implementation.CUDNN, query_len, "equal whole prompts"
                )
            ]
        elif query_len >= MIN_PROMPT:
            padded_len = -(-query_len // PAD) * PAD
            new = [
                PrefillGroup(index + i, 1, Implementation.CUDNN, padded_len, "long whole prompt")
                for i in range(num_spans)
            ]
        else:
            new = [_triton(index, num_spans, "short prompt: not worth a plan for its shape")]
        groups.extend(new)
        index += num_spans
    return _joined(groups)


def _triton(first: int, num_spans: int, reason: str) -> PrefillGroup:
    return PrefillGroup(first, num_spans, Implementation.TRITON, 0, reason)


def _runs(spans: Sequence[PrefillSpan]) -> list[tuple[int, bool, int]]:
    """Runs of alike spans: query length, whether it is the whole context, how many."""
    alike = groupby(spans, key=lambda span: (span.query_len, span.query_len == span.context_len))
    return [(query_len, whole, len(list(run))) for (query_len, whole), run in alike]


def _joined(groups: list[PrefillGroup]) -> list[PrefillGroup]:
    """Neighbouring Triton groups as one launch."""
    joined: list[PrefillGroup] = []
    for group in groups:
        before = joined[-1] if joined else None
        if (
            before is not None
            and before.implementation is group.implementation is Implementation.TRITON
        ):
            reasons = (before.reason, group.reason)
            reason = group.reason if group.reason in before.reason else "; ".join(reasons)
            joined[-1] = _triton(before.first, before.num_spans + group.num_spans, reason)
        else:
            joined.append(group)
    return joined
