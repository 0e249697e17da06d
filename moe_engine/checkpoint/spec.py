"""`WeightSpec`: how a layer says which part of which checkpoint tensor goes where."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WeightSpec:
    """One tensor, or one rank's share of it, and its place in a parameter.

    Attributes:
        name: Hugging Face tensor name in per-expert form, e.g.
            ``model.layers.3.mlp.experts.7.gate_proj.weight``.
        slices: what this rank reads of the full tensor, one slice of step 1 per dimension.
        target: where it goes: a view of a parameter, of exactly the slices' shape and any
            floating dtype; values are converted.
    """

    name: str
    slices: tuple[slice, ...]
    target: torch.Tensor
