"""Where the Triton kernels are tested: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_triton = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs triton, and a GPU or TRITON_INTERPRET=1",
)
needs_gpu = pytest.mark.skipif(
    not HAS_TRITON or INTERPRETED or not torch.cuda.is_available(),
    reason="needs an NVIDIA GPU and triton",
)

# The interpreter does not multiply bfloat16 matrices; on a GPU each dtype is another compilation.
MATMUL_DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]
