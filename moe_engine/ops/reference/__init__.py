"""PyTorch versions of every operation: readable, portable, and the standard for the kernels."""
