"""Draws what `step_timeline` recorded: where a layer's time goes, and kernel after kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = (
    "#1f6feb", "#bc8c00", "#2da44e", "#cf222e", "#8250df",
    "#58a6ff", "#e3c16f", "#7ee2a8", "#ff9492", "#c297ff",
)  # fmt: skip
OTHER, OTHER_COLOR = "other", "#afb8c1"
INK, PAPER = "#24292f", "#ffffff"
SHOWN_LAYERS = 2
LABEL_LENGTH = 34


def draw_timeline(result: dict[str, Any], path: Path) -> None:
    """Save one figure: a stacked bar per batch above, two layers' kernels of each batch below."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moe_engine"  # the same data give the same file
    from matplotlib import pyplot

    steps = result["steps"]
    colors = kernel_colors(steps)
    figure, axes = pyplot.subplots(
        1 + len(steps),
        figsize=(9, 2.2 + 1.1 * len(steps)),
        height_ratios=[1.0 + 0.4 * len(steps), *[1.0] * len(steps)],
        facecolor=PAPER,
    )
    _draw_sums(axes[0], steps, colors)
    for step, one in zip(steps, axes[1:], strict=True):
        _draw_kernels(one, step, result["num_layers"], colors)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def kernel_colors(steps: list[dict[str, Any]]) -> dict[str, str]:
    """A colour for each of the kernels that take the most time over all batches."""
    shares: dict[str, float] = {}
    for step in steps:
        for row in step["by_kernel"]:
            shares[row["name"]] = shares.get(row["name"], 0.0) + row["sum_us"] / step["busy_us"]
    longest = sorted(shares, key=lambda name: -shares[name])
    return dict(zip(longest, COLORS, strict=False))


def middle_window(kernels: list[dict[str, Any]], num_layers: int) -> tuple[float, float]:
    """Microseconds between which `SHOWN_LAYERS` layers run, halfway through the step."""
    end = max(kernel["start_us"] + kernel["duration_us"] for kernel in kernels)
    width = end / num_layers * SHOWN_LAYERS
    first = next(kernel["start_us"] for kernel in kernels if kernel["start_us"] >= end / 2)
    return first, first + width


def _draw_sums(axes: Any, steps: list[dict[str, Any]], colors: dict[str, str]) -> None:
    for place, step in enumerate(steps):
        left = 0.0
        sums = {row["name"]: row["per_layer_us"] for row in step["by_kernel"]}
        rest = sum(value for name, value in sums.items() if name not in colors)
        for name, color in [*colors.items(), (OTHER, OTHER_COLOR)]:
            width = rest if name == OTHER else sums.get(name, 0.0)
            label = name if len(name) <= LABEL_LENGTH else f"{name[: LABEL_LENGTH - 1]}…"
            label = label.lstrip("_")  # else the legend leaves it out
            axes.barh(place, width, left=left, color=color, label=label if place == 0 else None)
            left += width
        axes.text(left, place, f" {left:.0f} µs", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(steps)), [f"batch {step['batch']}" for step in steps])
    axes.invert_yaxis()
    axes.set_xlabel("µs a layer by which a kernel outlasts those before it", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_kernels(axes: Any, step: dict[str, Any], num_layers: int, colors: dict[str, str]) -> None:
    from benchmarks.step_timeline import Kernel, own_us, short_name

    first, last = middle_window(step["kernels"], num_layers)
    kernels = [Kernel(**kernel) for kernel in step["kernels"]]
    for kernel, own in zip(kernels, own_us(kernels), strict=True):
        end = kernel.start_us + kernel.duration_us
        if own > 0 and first <= end - own < last:
            color = colors.get(short_name(kernel.name), OTHER_COLOR)
            axes.broken_barh([(end - own - first, own)], (0, 1), color=color, linewidth=0)
    axes.set_xlim(0, last - first)
    axes.set_yticks([])
    axes.set_ylabel(f"batch {step['batch']}", rotation=0, ha="right", va="center", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=7)
