"""Trains the demo's tokenizer: byte-level BPE with Qwen's special tokens.

Run once, and the result is committed:

    python -m moe_engine.demo.train_tokenizer moe_engine/demo/data/tokenizer.json

There is no normaliser, so decoding gives back any UTF-8 text exactly.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# words and punctuation with the space before them; single digits; runs of white space
SPLIT_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def train(text: str) -> Tokenizer:
    """Train on ``text``; special tokens take the highest ids, the 256 bytes the lowest."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def main() -> None:
    """Write ``tokenizer.json`` to the path given as the only argument."""
    corpus = files("moe_engine.demo").joinpath("data/corpus.txt").read_text(encoding="utf-8")
    train(corpus).save(str(Path(sys.argv[1])), pretty=False)


if __name__ == "__main__":
    main()
