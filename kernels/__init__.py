"""Triton kernels, installed as ``moe_engine.kernels``; they import nothing else of moe_engine.

Callers go through `moe_engine.ops`, which checks the arguments.
"""
