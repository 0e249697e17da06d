"""Limits of kernels from the step times measured with each of them.

What is chosen today stays unless something else is faster by more than `MARGIN`, so that noise
does not change a table.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_engine.ops.tuning import INF, Steps, V

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

    def to_json(self) -> dict[str, Any]:
        """With times rounded to 0.1 us."""
        step_ms = {kernel: round(ms, 4) for kernel, ms in self.step_ms.items()}
        return vars(self) | {"step_ms": step_ms}


def best_kernel(steps: Sequence[Timed], kernels: Sequence[str]) -> str:
    """The fastest of some kernels, but the first if none is faster by more than the margin.

    Args:
        steps: of one batch size, with prompts of several lengths; they count alike.
        kernels: those that have not been timed in each of the steps are left out.
    """
    timed = [kernel for kernel in kernels if all(kernel in step.step_ms for step in steps)]

    def cost(kernel: str) -> float:
        """The time over the first one's, on average."""
        return statistics.mean(step.step_ms[kernel] / step.step_ms[timed[0]] for step in steps)

    fastest = min(timed, key=cost)
    return fastest if cost(fastest) < 1 - MARGIN else timed[0]


def by_batch(timed: Sequence[Timed]) -> dict[int, list[Timed]]:
    """Steps by their batch size, ascending."""
    batches = sorted({step.batch for step in timed})
    return {batch: [step for step in timed if step.batch == batch] for batch in batches}


def renewed(present: Steps[V], points: Sequence[tuple[float, V]]) -> Steps[V]:
    """Today's steps, but for where something else was better.

    A limit stays where it is if it lies between the same two points; a new one is at a point. What
    was best at the last point is so up to today's next limit, if there is one; beyond, everything
    stays.

    Args:
        points: (amount, what was best for it), ascending.

    Example: today ``((3, "a"), (8, "b"), (INF, "c"))``, and the points are ``(1, "a"), (2, "b"),
    (4, "b")``. Between 1 and 2 there is no limit today, so the new one is 1; "b" is best up to 8:
    ``((1, "a"), (8, "b"), (INF, "c"))``.
    """
    steps: list[tuple[float, V]] = []
    for (amount, best), (following, other) in itertools.pairwise(points):
        if best != other:
            limits = [limit for limit, _ in present if amount <= limit < following]
            steps.append((limits[0] if limits else amount, best))
    amount, best = points[-1]
    (limit, today), *rest = [step for step in present if step[0] >= amount]
    if limit < INF:
        steps.append((limit, best))
    else:
        steps += [(amount, best), (limit, today)]
    steps += rest
    # What goes on beyond a limit needs none there.
    return tuple(
        step
        for step, later in itertools.zip_longest(steps, steps[1:])
        if later is None or later[1] != step[1]
    )
