"""`IncrementalDetokenizer`: token ids in, text out as soon as it cannot change any more.

The bytes of a byte-level token do not depend on its neighbours (`Tokenizer.token_bytes`), so the
only thing that can be unsettled is a UTF-8 character whose last bytes are still to come: at most
three bytes are ever held back, and bytes that cannot become a character turn into U+FFFD when the
next byte shows it. (`tokenizers.DecodeStream` looks for a trailing U+FFFD in the decoded text
instead: a run of invalid bytes, or a genuine U+FFFD, makes it hold everything back and decode it
again with every token, and it has no way to flush.)
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from moe_engine.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Decodes one output sequence.

    All pieces together are exactly ``tokenizer.decode(token_ids, skip_special_tokens)`` of the
    pushed ids, however they are split. The prompt plays no part: an output that begins with the
    second half of a character gives U+FFFD, as decoding its ``token_ids`` alone does.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens; returns the text that they settled, O(1) per token."""
        return self._utf8.decode(b"".join([self._visible_bytes(i) for i in token_ids]))

    def finish(self) -> str:
        """The text still held back: "" or U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)

    def _visible_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text: none for a skipped or unknown token."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return b""
        return self._tokenizer.token_bytes(token_id) or b""
