"""Whether a request can be served at all, and how long its output may grow."""

from __future__ import annotations

from moe_engine.errors import InvalidRequestError
from moe_engine.types.messages import AddRequest

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"


def limit_output_tokens(
    request: AddRequest, *, max_model_len: int, num_blocks: int, block_size: int
) -> int:
    """The most tokens that the request may produce.

    That is ``max_tokens``, or if it is None whatever the context length and the KV blocks of one
    DP group leave. The last sampled token is never fed back, so it needs no KV.

    Raises:
        InvalidRequestError: the prompt is empty, the request does not fit ``max_model_len``, or it
            would not fit ``num_blocks`` blocks even if it ran alone.
    """
    num_prompt_tokens = len(request.token_ids)
    max_tokens = request.params.max_tokens
    min_tokens = request.params.min_tokens
    num_kv_tokens = num_blocks * block_size
    if num_prompt_tokens == 0:
        raise InvalidRequestError(
            "the prompt is empty; it must have at least 1 token",
            param="prompt",
            code="empty_prompt",
        )
    if num_prompt_tokens + 1 > max_model_len:
        raise InvalidRequestError(
            f"the prompt has {num_prompt_tokens} tokens; with at least 1 output token it exceeds "
            f"the maximum context length of {max_model_len} tokens. Shorten the prompt.",
            param="prompt",
            code=CONTEXT_LENGTH_EXCEEDED,
        )
    if num_prompt_tokens > num_kv_tokens:
        raise InvalidRequestError(
            f"the prompt's {num_prompt_tokens} tokens need "
            f"{-(-num_prompt_tokens // block_size)} KV blocks of {block_size} tokens; a DP group "
            f"has {num_blocks} ({num_kv_tokens} tokens). Shorten the prompt or start the engine "
            f"with more KV cache.",
            param="prompt",
            code=CONTEXT_LENGTH_EXCEEDED,
        )
    limit = min(max_model_len - num_prompt_tokens, num_kv_tokens + 1 - num_prompt_tokens)
    # Without max_tokens the output is cut where room ends, but min_tokens is still a demand.
    param, wanted = ("min_tokens", min_tokens) if max_tokens is None else ("max_tokens", max_tokens)
    if num_prompt_tokens + wanted > max_model_len:
        raise InvalidRequestError(
            f"the prompt's {num_prompt_tokens} tokens and {param} = {wanted} make "
            f"{num_prompt_tokens + wanted}; the maximum context length is {max_model_len} tokens. "
            f"Shorten the prompt or lower {param} to {limit}.",
            param=param,
            code=CONTEXT_LENGTH_EXCEEDED,
        )
    if wanted > limit:
        num_needed = num_prompt_tokens + wanted - 1
        raise InvalidRequestError(
            f"{num_prompt_tokens} prompt tokens + {param} {wanted} - 1 = {num_needed} tokens need "
            f"{-(-num_needed // block_size)} KV blocks of {block_size} tokens; a DP group has "
            f"{num_blocks} ({num_kv_tokens} tokens). Lower {param} to {limit} or start the engine "
            f"with more KV cache.",
            param=param,
            code=CONTEXT_LENGTH_EXCEEDED,
        )
    return limit if max_tokens is None else max_tokens
