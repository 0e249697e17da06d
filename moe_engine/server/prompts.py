"""From texts, token ids and messages to prompts that fit, and from fields to `SamplingParams`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_engine.errors import InvalidRequestError
from moe_engine.server.protocol.chat import ChatCompletionRequest, Content, Message
from moe_engine.server.protocol.sampling import SamplingFields
from moe_engine.types.messages import EngineReady
from moe_engine.types.sampling import SamplingParams

if TYPE_CHECKING:
    from moe_engine.text.tokenizer import Tokenizer

# Arguments of the chat template call that are request fields of their own, or the conversation.
_RESERVED_TEMPLATE_KWARGS = ("messages", "tools", "add_generation_prompt")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model sees it; ``text`` is None if it came as token ids."""

    token_ids: list[int]
    text: str | None = None


class PromptEncoder:
    """Tokenises off the event loop; refuses texts that cannot fit without tokenising them.

    A prompt of ``max_model_len`` tokens has at most ``max_model_len`` times the longest token's
    bytes, so a text with more characters than that is too long whatever it says.
    """

    def __init__(self, tokenizer: Tokenizer, info: EngineReady) -> None:
        self._tokenizer = tokenizer
        self._info = info
        self._max_chars: int | None = None

    async def encode(
        self, prompts: Sequence[str | list[int]], *, add_special_tokens: bool
    ) -> list[Prompt]:
        """Token ids of texts; token ids are checked against the vocabulary.

        Raises:
            InvalidRequestError: a text or list of ids is too long, or an id out of range.
        """

        def encode() -> list[Prompt]:
            return [
                self._encode_text(prompt, add_special_tokens)
                if isinstance(prompt, str)
                else self._check_ids(prompt)
                for prompt in prompts
            ]

        has_text = any(isinstance(prompt, str) for prompt in prompts)
        return await asyncio.to_thread(encode) if has_text else encode()

    async def render_chat(self, request: ChatCompletionRequest) -> Prompt:
        """Token ids of a conversation in the model's chat template.

        Raises:
            InvalidRequestError: the conversation is too long, or the template refuses it.
        """
        kwargs: dict[str, Any] = request.chat_template_kwargs or {}
        for name in _RESERVED_TEMPLATE_KWARGS:
            if name in kwargs:
                raise InvalidRequestError(
                    f"chat_template_kwargs.{name} is a request field of its own",
                    param="chat_template_kwargs",
                )
        messages = [_template_message(message) for message in request.messages]
        num_chars = sum(
            len(value)
            for message in messages
            for value in message.values()
            if isinstance(value, str)
        )
        add_generation_prompt = request.add_generation_prompt is not False

        def render() -> Prompt:
            self._check_length(num_chars, "messages")
            return Prompt(
                self._tokenizer.apply_chat_template(
                    messages, add_generation_prompt=add_generation_prompt, **kwargs
                )
            )

        return await asyncio.to_thread(render)

    def _encode_text(self, text: str, add_special_tokens: bool) -> Prompt:
        self._check_length(len(text), "prompt")
        return Prompt(self._tokenizer.encode(text, add_special_tokens=add_special_tokens), text)

    def _check_ids(self, token_ids: list[int]) -> Prompt:
        limit = self._info.vocab_size
        if token_ids and max(token_ids) >= limit:
            position = next(i for i, token_id in enumerate(token_ids) if token_id >= limit)
            raise InvalidRequestError(
                f"prompt has token id {token_ids[position]} at position {position}; the "
                f"vocabulary has ids 0 to {limit - 1}",
                param="prompt",
            )
        return Prompt(token_ids)

    def _check_length(self, num_chars: int, param: str) -> None:
        if self._max_chars is None:
            longest = max(
                len(self._tokenizer.token_bytes(token_id) or b"")
                for token_id in range(self._info.vocab_size)
            )
            # No token has a text where there is no tokenizer, whose stand-in refuses any text.
            self._max_chars = self._info.max_model_len * longest or sys.maxsize
        if num_chars > self._max_chars:
            raise InvalidRequestError(
                f"{param} has {num_chars} characters; the context of {self._info.max_model_len} "
                f"tokens holds at most {self._max_chars}",
                param=param,
                code="context_length_exceeded",
            )


def check_fits(prompt: Prompt, max_tokens: int, max_model_len: int, *, param: str) -> None:
    """Raise `InvalidRequestError` unless the prompt and ``max_tokens`` >= 1 fit the context.

    Args:
        param: the request field of the prompt.
    """
    num_tokens = len(prompt.token_ids)
    if num_tokens == 0:
        raise InvalidRequestError(f"{param} is empty: it has no tokens", param=param)
    if num_tokens >= max_model_len:
        raise InvalidRequestError(
            f"the context is {max_model_len} tokens, of which one at least is for the output, but "
            f"{param} has {num_tokens} tokens",
            param=param,
            code="context_length_exceeded",
        )
    if num_tokens + max_tokens > max_model_len:
        raise InvalidRequestError(
            f"the context is {max_model_len} tokens, but {param} has {num_tokens} and max_tokens "
            f"is {max_tokens}; max_tokens can be at most {max_model_len - num_tokens}",
            param="max_tokens",
            code="context_length_exceeded",
        )


def make_sampling_params(
    request: SamplingFields,
    defaults: Mapping[str, float | int],
    info: EngineReady,
    **values: Any,
) -> SamplingParams:
    """The request's sampling parameters; ``defaults`` stand in for fields it leaves out.

    Args:
        values: fields that completions and chat completions name differently.

    Raises:
        InvalidRequestError: a value is out of range or names a token that does not exist.
    """
    params = SamplingParams(**{**defaults, **request.sampling_values(), **values})
    params.check_vocabulary(info.vocab_size)
    return params


def check_stream_options(request: SamplingFields) -> None:
    """Raise `InvalidRequestError` for stream options without a stream."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError(
            "stream_options is given, but stream is not true", param="stream_options"
        )


def _template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: one text, ``developer`` under its older name."""
    fields = message.model_dump(exclude_none=True)
    if fields["role"] == "developer":
        fields["role"] = "system"
    if message.content is not None:
        fields["content"] = _flat_text(message.content)
    elif "tool_calls" in fields:
        fields["content"] = ""
    else:
        raise InvalidRequestError(
            "an assistant message needs content or tool_calls", param="messages"
        )
    return fields


def _flat_text(content: Content) -> str:
    """The text of a message; parts are put on lines of their own."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
