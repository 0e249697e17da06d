"""A byte-level tokenizer of any size, so that a model without one can be served as text.

Ids 0 to 255 are the bytes; every id from there on is a word of its own, a space and four or more
letters, about as long as a real vocabulary's entries. There are no merges: texts are encoded byte
by byte, but outputs, which a random model draws from the whole vocabulary, look like prose.
"""

from __future__ import annotations

import json
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MIN_LETTERS = 4


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; ``vocab_size`` is at least 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token_id in range(len(vocab), vocab_size):
        vocab["Ġ" + _word(token_id)] = token_id
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _word(number: int) -> str:
    """The number in base 26, at least `MIN_LETTERS` digits."""
    letters = ""
    while number or len(letters) < MIN_LETTERS:
        number, digit = divmod(number, len(LETTERS))
        letters = LETTERS[digit] + letters
    return letters
