"""Plain torch references of every operator: the CPU path, and what kernels are judged by."""
