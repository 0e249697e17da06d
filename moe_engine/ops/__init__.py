"""Operations on tensors: each checks shapes and dtypes, then picks CUDA, Triton or PyTorch.

`moe_engine.ops.reference` holds the PyTorch versions: the CPU path, and what tests compare with.
"""
