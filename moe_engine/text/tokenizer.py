"""`Tokenizer`: text to token ids and back, exact to the byte, and the model's chat template.

Qwen checkpoints have byte-level BPE vocabularies: a token is a run of bytes, written in the
vocabulary with one printable character per byte (the table of GPT-2's encoder). The bytes of a
token sequence are therefore the concatenation of the tokens' bytes, whatever stands around them,
which is what makes exact incremental decoding simple (`text.detokenizer`). Other kinds of
tokenizer are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_engine.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a request may set of the chat template call besides the template's own variables; the other
# parameters (another template, truncation, tensors, ...) belong to the server.
_REQUEST_TEMPLATE_OPTIONS = {"documents", "continue_final_message"}


class Tokenizer:
    """The tokenizer of a checkpoint; all methods may be called from several threads at once.

    It talks to the `tokenizers` object below the transformers one, whose encode and decode do not
    change it; the transformers wrapper sets truncation and padding on every call and cannot be
    shared.
    """

    def __init__(self, hf_tokenizer: PreTrainedTokenizerBase) -> None:
        """Take over a transformers tokenizer; `from_directory` is the usual way in.

        Raises:
            ConfigError: it is not a byte-level tokenizer of the `tokenizers` library.
        """
        from tokenizers.decoders import ByteLevel

        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        if backend is None or not isinstance(decoder, ByteLevel):
            raise ConfigError(
                f"the tokenizer {type(hf_tokenizer).__name__} decodes with "
                f"{type(decoder).__name__}; only byte-level BPE tokenizers, as Qwen3-MoE "
                "checkpoints have them, are supported"
            )
        # A tokenizer.json may have been saved with these on; a prompt is never cut silently.
        backend.no_truncation()
        backend.no_padding()
        self._hf = hf_tokenizer
        self._backend = backend
        # Special is the text, not the id: a vocabulary entry that spells one is special as well.
        special_texts = {
            token.content for token in backend.get_added_tokens_decoder().values() if token.special
        }
        self._special_ids = frozenset(
            token_id
            for text in special_texts
            if (token_id := backend.token_to_id(text)) is not None
        )
        self._byte_of_char = {char: byte for byte, char in enumerate(_byte_characters())}
        self._bytes_of_id: dict[int, bytes | None] = {}

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Load the tokenizer of the checkpoint in directory ``path``; never asks the network.

        Raises:
            ConfigError: files are missing or broken, or the tokenizer is not byte-level BPE.
        """
        path = Path(path)
        if not path.is_dir():
            raise ConfigError(f"the tokenizer directory {path} does not exist")
        if not (path / "tokenizer.json").is_file():
            missing = [name for name in ("vocab.json", "merges.txt") if not (path / name).is_file()]
            if missing:
                raise ConfigError(
                    f"{path} has no tokenizer: {path / 'tokenizer.json'} is missing, and without "
                    f"{' and '.join(missing)} nothing can stand in for it"
                )
        from transformers import AutoTokenizer

        try:
            hf_tokenizer = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # broken files surface as bare Exception, KeyError, TypeError
            raise ConfigError(f"the tokenizer in {path} cannot be loaded: {error}") from error
        return cls(hf_tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token, or None if the tokenizer names none."""
        token_id = self._hf.eos_token_id
        return token_id if token_id is None else int(token_id)

    def encode(
        self, text: str, add_special_tokens: bool = True, *, param: str = "prompt"
    ) -> list[int]:
        """The token ids of ``text``; special tokens spelled out in it become their ids.

        Args:
            add_special_tokens: let the tokenizer add what it puts around a text (Qwen's: nothing).
            param: the request field that the text came from, for the error.

        Raises:
            InvalidRequestError: ``text`` holds lone surrogates.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"{param} is not valid Unicode: character {error.start} is the lone surrogate "
                f"U+{ord(text[error.start]):04X}",
                param=param,
            ) from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 give U+FFFD, unknown ids nothing.

        Spaces before punctuation are never tidied (``clean_up_tokenization_spaces``): the text
        is exactly the tokens' bytes.
        """
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for; None for an id without a token."""
        if token_id not in self._bytes_of_id:
            token: str | None = self._backend.id_to_token(token_id)
            self._bytes_of_id[token_id] = None if token is None else self._bytes_of_token(token)
        return self._bytes_of_id[token_id]

    def token_text(self, token_id: int) -> str:
        """A token decoded alone: U+FFFD for parts of a character, "" for an unknown id."""
        return (self.token_bytes(token_id) or b"").decode(errors="replace")

    def is_special(self, token_id: int) -> bool:
        """Whether ``skip_special_tokens`` leaves the token out."""
        return token_id in self._special_ids

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """The prompt's token ids for a conversation.

        Args:
            messages: OpenAI chat messages; keys whose value is None count as absent.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: end with the header of the assistant's turn.
            kwargs: variables for the template (``enable_thinking``, ...), or
                ``continue_final_message``.

        Raises:
            InvalidRequestError: there is no template, it refused the messages (the error carries
                its words), or an option is not a request's to set.
        """
        reserved = set(inspect.signature(self._hf.apply_chat_template).parameters)
        refused = sorted(kwargs.keys() & (reserved - _REQUEST_TEMPLATE_OPTIONS))
        if refused:
            raise InvalidRequestError(
                f"chat template options {', '.join(refused)} cannot be set by a request",
                param="chat_template_kwargs",
            )
        if not self._hf.chat_template:
            raise InvalidRequestError(
                "the model's tokenizer has no chat template; send a plain prompt instead",
                param="messages",
            )
        try:
            text = self._hf.apply_chat_template(
                # Some transformers versions show the None to the template, and many print it.
                [{k: v for k, v in m.items() if v is not None} for m in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **kwargs,
            )
        except Exception as error:  # templates run on users' data and can fail in any way
            raise InvalidRequestError(
                f"the chat template refused the messages: {error}", param="messages"
            ) from error
        assert isinstance(text, str), "one conversation, not tokenized, renders to one text"
        # The template has written the special tokens itself.
        return self.encode(text, add_special_tokens=False, param="messages")

    def _bytes_of_token(self, token: str) -> bytes:
        """The bytes behind a vocabulary entry, by the same rule as the byte-level decoder's."""
        try:
            return bytes(self._byte_of_char[char] for char in token)
        except KeyError:  # an added token that is kept as plain text
            return token.encode()


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's encoder).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100, U+0101, ...
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)
    ]
