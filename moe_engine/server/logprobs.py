"""Log-probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_engine.server.protocol.chat import (
    ChatLogprobs,
    PositionLogprobEntry,
    TokenLogprobEntry,
)
from moe_engine.server.protocol.completions import CompletionLogprobs
from moe_engine.types.results import PositionLogprobs, TokenLogprob

if TYPE_CHECKING:
    from moe_engine.text.tokenizer import Tokenizer

# JSON has no infinity; OpenAI writes this for a token that is next to impossible.
LEAST_LOGPROB = -9999.0


class CompletionLogprobsWriter:
    """Writes one choice's log-probabilities; remembers where in the text the next token starts.

    Args:
        skip_special_tokens: special tokens of the output are not part of its text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._offset = 0
        # A character can span tokens: it counts with the token that completes it.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def write_prompt(
        self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]
    ) -> CompletionLogprobs:
        """The echoed prompt; its first token has no log-probability."""
        written = CompletionLogprobs()
        for token_id, position in zip(token_ids, positions, strict=True):
            self._append(written, token_id, position, is_text=True)
        return written

    def write_output(self, positions: Sequence[PositionLogprobs]) -> CompletionLogprobs:
        """Tokens of the output, after those written before."""
        written = CompletionLogprobs()
        for position in positions:
            token_id = position.chosen.token_id
            is_text = not (self._skip_special_tokens and self._tokenizer.is_special(token_id))
            self._append(written, token_id, position, is_text=is_text)
        return written

    def _append(
        self,
        written: CompletionLogprobs,
        token_id: int,
        position: PositionLogprobs | None,
        *,
        is_text: bool,
    ) -> None:
        written.tokens.append(self._name(token_id))
        written.text_offset.append(self._offset)
        if is_text:
            self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(token_id) or b""))
        if position is None:
            written.token_logprobs.append(None)
            written.top_logprobs.append(None)
            return
        written.token_logprobs.append(_finite(position.chosen.logprob))
        written.top_logprobs.append(
            {
                self._name(token.token_id): _finite(token.logprob)
                for token in (*position.top, position.chosen)
            }
        )

    def _name(self, token_id: int) -> str:
        """The token's text, or OpenAI's ``bytes:\\xe2\\x80`` if it is not whole characters."""
        token_bytes: bytes = self._tokenizer.token_bytes(token_id) or b""
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def concatenate(*parts: CompletionLogprobs) -> CompletionLogprobs:
    """Several runs of tokens as one."""
    return CompletionLogprobs(
        tokens=[x for part in parts for x in part.tokens],
        token_logprobs=[x for part in parts for x in part.token_logprobs],
        top_logprobs=[x for part in parts for x in part.top_logprobs],
        text_offset=[x for part in parts for x in part.text_offset],
    )


def chat_logprobs(tokenizer: Tokenizer, positions: Sequence[PositionLogprobs]) -> ChatLogprobs:
    """Output tokens in the shape of chat completions."""
    return ChatLogprobs(
        content=[
            PositionLogprobEntry(
                **_chat_entry(tokenizer, position.chosen).model_dump(),
                top_logprobs=[_chat_entry(tokenizer, token) for token in position.top],
            )
            for position in positions
        ]
    )


def _chat_entry(tokenizer: Tokenizer, token: TokenLogprob) -> TokenLogprobEntry:
    token_bytes = tokenizer.token_bytes(token.token_id)
    return TokenLogprobEntry(
        token=token.text,
        logprob=_finite(token.logprob),
        bytes=None if token_bytes is None else list(token_bytes),
    )


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
