"""Operators: what the layers and the engine compute with."""
