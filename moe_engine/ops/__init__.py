"""Operators: each checks shapes and dtypes, then picks CUDA, Triton or the torch reference."""
