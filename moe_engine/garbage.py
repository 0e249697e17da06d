"""Keeps Python's cycle collector from stopping a step.

A full collection walks every object of the process, some 80 ms with torch imported, and a step at
batch 1 takes 2 ms. What exists once the engine is up stays, so it need not be walked; what a step
makes is freed by reference counts, so young objects may gather before anybody looks for cycles
among them (errors with tracebacks make some). A start, which compiles, would collect for a second.
"""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 50_000
"""Objects made and not freed again before the collector looks at the youngest: far more than the
plan of a step and its results hold."""


def settle() -> None:
    """Collect now, leave out what is left for good, and collect rarely from here on.

    For processes that are the engine's own; a user's script keeps its settings.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
