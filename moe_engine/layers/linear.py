"""Linear layers cut over the attention-TP group.

Shape legend: T tokens, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moe_engine.checkpoint.spec import WeightSpec
from moe_engine.layers.context import LayerContext
from moe_engine.ops.linear import AddedOutput, SplitSums, linear, linear_onto, unsummed_linear


class ColumnParallelLinear(nn.Module):
    """Several projections of one input, each cut by output rows, kept as one fused weight.

    Args:
        context: sizes and placement.
        in_features: I.
        shards: for each projection (its checkpoint name, the slice of its rows held here).
        bias: whether the projections have a bias.
    """

    def __init__(
        self,
        context: LayerContext,
        in_features: int,
        shards: list[tuple[str, slice]],
        *,
        bias: bool,
    ) -> None:
        super().__init__()
        self._shards = shards
        rows = sum(rows.stop - rows.start for _, rows in shards)
        self.weight = context.parameter(rows, in_features)
        self.bias = context.parameter(rows) if bias else None

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """The local outputs of all projections side by side, [T, sum of local rows]."""
        return linear(x_TI, self.weight, self.bias)

    def unsummed(self, x_TI: torch.Tensor) -> torch.Tensor | SplitSums:
        """The same, perhaps still to be summed."""
        if self.bias is not None:
            return self(x_TI)
        return unsummed_linear(x_TI, self.weight)

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        """What to read from the checkpoint, named ``<prefix><projection>.weight`` / ``.bias``."""
        first = 0
        for name, rows in self._shards:
            last = first + rows.stop - rows.start
            yield WeightSpec(
                f"{prefix}{name}.weight",
                (rows, slice(0, self.weight.shape[1])),
                self.weight.data[first:last],
            )
            if self.bias is not None:
                yield WeightSpec(f"{prefix}{name}.bias", (rows,), self.bias.data[first:last])
            first = last


class RowParallelLinear(nn.Module):
    """A projection cut by input columns; the partial outputs are summed over the TP group."""

    def __init__(
        self, context: LayerContext, name: str, columns: slice, out_features: int, *, bias: bool
    ) -> None:
        super().__init__()
        self._name = name
        self._columns = columns
        self._tp = context.groups.tp
        self.weight = context.parameter(out_features, columns.stop - columns.start)
        self.bias = context.parameter(out_features) if bias else None

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor | SplitSums:
        """The full output [T, O], the same on every rank of the TP group."""
        if self._tp.size == 1 and self.bias is None:
            return unsummed_linear(x_TI, self.weight)
        out_TO = self._tp.all_reduce(linear(x_TI, self.weight))
        return out_TO if self.bias is None else out_TO + self.bias

    def onto(
        self, x_TI: torch.Tensor, residual_TO: torch.Tensor
    ) -> torch.Tensor | SplitSums | AddedOutput:
        """The same, perhaps added to ``residual_TO`` in place, which nobody else may need."""
        if self._tp.size == 1 and self.bias is None:
            return linear_onto(x_TI, self.weight, residual_TO)
        return self(x_TI)

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        """What to read from the checkpoint."""
        out_features = self.weight.shape[0]
        yield WeightSpec(
            f"{prefix}{self._name}.weight",
            (slice(0, out_features), self._columns),
            self.weight.data,
        )
        if self.bias is not None:
            yield WeightSpec(
                f"{prefix}{self._name}.bias", (slice(0, out_features),), self.bias.data
            )
