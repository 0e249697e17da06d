"""Reading weights: what a checkpoint must hold, where its bytes lie, and how they reach tensors."""

from moe_engine.checkpoint.dummy import fill_dummy
from moe_engine.checkpoint.load import load_weights
from moe_engine.checkpoint.reader import Checkpoint
from moe_engine.checkpoint.spec import WeightSpec
from moe_engine.checkpoint.tensors import checkpoint_tensors

__all__ = ["Checkpoint", "WeightSpec", "checkpoint_tensors", "fill_dummy", "load_weights"]
