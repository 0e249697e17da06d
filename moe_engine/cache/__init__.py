"""The paged KV cache: block bookkeeping and prefix reuse (no torch), and the KV tensors."""
