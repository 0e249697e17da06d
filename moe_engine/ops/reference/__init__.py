"""Pure-torch references of the operators, the ground truth that kernels are checked against."""
