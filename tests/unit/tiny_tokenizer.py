"""A byte-level BPE tokenizer with Qwen's special tokens and a chat template, made on the spot."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from moe_engine.text.tokenizer import Tokenizer

CHAT_TEMPLATE = """
{%- if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool.function.name }}{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'banned' %}{{ raise_exception('the role banned is not allowed') }}{% endif %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.content is defined %}{{ '' + message.content }}{% endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- endif %}"""

_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, hello token, stop here; STOP there",
    "你好，世界。今天天气很好，我们去公园吧。",
    "naïve café, 🙂🙃👩‍👩‍👧 e\u0301",
]


def save_tiny_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write the files of a checkpoint's tokenizer into ``directory``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 4, trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    # Added tokens that are not special, as Qwen's <think>; and texts at the edge of the byte
    # table: a space and CJK are outside of it, a lone é is inside and means the byte 0xE9.
    backend.add_tokens(
        [
            AddedToken(text, special=False)
            for text in ("<think>", "</think>", "two words", "é", "猫")
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    """The tokenizer, loaded once per test session."""
    with tempfile.TemporaryDirectory() as directory:
        save_tiny_tokenizer(Path(directory))
        return Tokenizer.from_directory(directory)


def token_id_of(text: str) -> int:
    """The id of the one token that ``text`` is."""
    (token_id,) = tiny_tokenizer().encode(text)
    return token_id


def byte_ids(data: bytes) -> list[int]:
    """One token per byte of ``data``."""
    tokenizer = tiny_tokenizer()
    id_of_byte = {tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    return [id_of_byte[bytes([byte])] for byte in data]
