"""Limits of kernels from the step times measured with each of them.

What is chosen today stays unless something else is faster by more than `MARGIN`, so that noise
does not change a table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moe_engine.ops.tuning import Tiles

MARGIN = 0.005
"""Share of a step's time."""


@dataclass(frozen=True)
class Timed:
    """Times of the same decode step with different kernels for one operator.

    Attributes:
        batch: its rows.
        input: tokens of a prompt.
        present: the kernel that the operator chooses today; it has been timed.
        step_ms: by kernel.
    """

    batch: int
    input: int
    present: str
    step_ms: Mapping[str, float]

    def cost(self, kernel: str) -> float:
        """The step's time over today's; never so little below 1 that it may be noise."""
        ratio = self.step_ms.get(kernel, math.inf) / self.step_ms[self.present]
        return ratio if ratio < 1 - MARGIN else max(ratio, 1.0)

    def best(self, kernels: Sequence[str]) -> str:
        """The first of these, unless others are faster by more than the margin; the fastest then.

        Only kernels that have been timed are considered.
        """
        timed = [kernel for kernel in kernels if kernel in self.step_ms]
        fastest = min(timed, key=lambda kernel: self.step_ms[kernel])
        is_noise = self.step_ms[fastest] >= (1 - MARGIN) * self.step_ms[timed[0]]
        return timed[0] if is_noise else fastest

    def to_json(self) -> dict[str, Any]:
        """With times rounded to 0.1 us."""
        step_ms = {kernel: round(ms, 4) for kernel, ms in self.step_ms.items()}
        return asdict(replace(self, step_ms=step_ms))


def best_limits(
    timed: Sequence[Timed], order: Sequence[str], present: Sequence[int]
) -> tuple[list[int], float]:
    """Rows up to which each kernel but the last runs, so that the steps take least time in all.

    A limit stays where it is if it lies between the same two batch sizes as the best one.

    Example, of the order (a, b) with a limit of 4 so far: if b is faster than a from batch 4 on,
    and 2 and 4 are measured, the limit becomes 2.

    Args:
        timed: batch sizes may repeat, with other inputs.
        order: kernels, for few rows first.
        present: today's limits, one less than kernels.

    Returns:
        The limits, ascending, and the sum of `Timed.cost`.
    """
    batches = sorted({step.batch for step in timed})

    def total(limits: Sequence[int]) -> tuple[float, int]:
        """The cost of all steps, and in how many another kernel would run than today."""
        kernels = [_kernel(step.batch, order, limits) for step in timed]
        costs = [step.cost(kernel) for step, kernel in zip(timed, kernels, strict=True)]
        changes = [step.present != kernel for step, kernel in zip(timed, kernels, strict=True)]
        return sum(costs), sum(changes)

    best = min(
        itertools.combinations_with_replacement([0, *batches], len(order) - 1),
        key=total,
    )
    limits = []
    for limit, today in zip(best, present, strict=True):
        following = next((batch for batch in batches if batch > limit), math.inf)
        limits.append(today if limit <= today < following else limit)
    return limits, total(best)[0]


def _kernel(batch: int, order: Sequence[str], limits: Sequence[int]) -> str:
    """The kernel that runs for a batch."""
    return next((k for k, most in zip(order, limits, strict=False) if batch <= most), order[-1])


def renewed_tiles(points: Sequence[tuple[float, int]], present: Tiles) -> Tiles:
    """Today's tiles, but for where another was better.

    A limit stays where it is if it lies between the same two points; a new one is at a point.
    Beyond the last point everything stays.

    Args:
        points: (average pairs of an expert, best tile), ascending.

    Example: ``renewed_tiles([(1, 16), (2, 32), (4, 32)], ((3, 16), (8, 32), (inf, 64)))`` is
    ``((1, 16), (8, 32), (inf, 64))``.
    """
    tiles: list[tuple[float, int]] = []
    for (pairs, tile), (following, other) in itertools.pairwise(points):
        if tile != other:
            limits = [most for most, _ in present if pairs <= most < following]
            tiles.append((limits[0] if limits else pairs, tile))
    pairs, tile = points[-1]
    rest = [(most, later) for most, later in present if most >= pairs]
    if rest[0][1] != tile:
        tiles.append((pairs, tile))
        rest = [(most, later) for most, later in rest if most > pairs]
    return (*tiles, *rest)
