"""Between text and token ids: tokenizer, chat template, detokenizer, stop strings, outputs.

The only package that may import transformers. Everything here runs in the front end; the engine
core and the ranks see token ids alone.
"""
