"""The paged KV cache: block accounting (pure Python) and the tensors behind it."""
