"""`NoTokenizer`: stands in where the engine was told to do without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from moe_engine.errors import InvalidRequestError
from moe_engine.text.tokenizer import Tokenizer


class NoTokenizer(Tokenizer):
    """Refuses whatever needs a tokenizer; outputs have token ids and an empty text."""

    def __init__(self) -> None:
        """Nothing to load."""

    @property
    def vocab_size(self) -> int:
        """No token has a text."""
        return 0

    @property
    def eos_token_id(self) -> None:
        """Not known here; the model's configuration names its own."""

    def encode(
        self, text: str, add_special_tokens: bool = True, *, param: str = "prompt"
    ) -> list[int]:
        """Raise `InvalidRequestError`."""
        _refuse(param)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Always ""."""
        return ""

    def token_bytes(self, token_id: int) -> None:
        """No token has a text."""

    def is_special(self, token_id: int) -> bool:
        """Whatever a token is, it has no text."""
        return False

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Raise `InvalidRequestError`."""
        _refuse("messages")


def _refuse(param: str) -> NoReturn:
    raise InvalidRequestError(
        "the engine runs without a tokenizer (skip_tokenizer_init); send token ids", param=param
    )
