"""The README's table of the exchange and its plot, from what `bench_exchange` has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SECTION = "exchange-results"
HALVES = ("dispatch", "combine")
COLORS = {"dispatch": "#1f6feb", "combine": "#bc8c00"}
INK, PAPER = "#24292f", "#ffffff"


def uniform_rows(result: dict[str, Any]) -> dict[int, dict[str, dict[str, Any]]]:
    """Of uniform routing: by tokens a rank, then by type on the wire."""
    rows: dict[int, dict[str, dict[str, Any]]] = {}
    for row in result["results"]:
        if row["routing"] == "uniform":
            rows.setdefault(row["tokens"], {})[row["dtype"]] = row
    return dict(sorted(rows.items()))


def render_exchange(result: dict[str, Any]) -> str:
    """A row for each number of tokens, then the conditions, in Markdown; of virtual ranks."""
    lines = [
        "| tokens a rank | by | dispatch, µs | combine, µs | of a copy's rate "
        "| dispatch in FP8, µs |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for tokens, types in uniform_rows(result).items():
        row, fp8 = types["bf16"], types.get("fp8")
        shares = " / ".join(f"{row['copy_us'][half] / row[f'{half}_us']:.0%}" for half in HALVES)
        lines.append(
            f"| {tokens} | {row['kind']} | {row['dispatch_us']:.1f} | {row['combine_us']:.1f} | "
            f"{shares} | {'' if fp8 is None else format(fp8['dispatch_us'], '.1f')} |"
        )
    commit = f" at commit {result['commit'][:7]}" if result.get("commit") else ""
    conditions = (
        f"One {result['gpu']['name']}, {result['ranks']} virtual ranks, hidden size "
        f"{result['hidden']}, {result['topk']} of {result['experts']} experts, uniform routing, "
        "bfloat16; in CUDA graphs, medians of the slowest rank's times, bits compared with the "
        f"reference's before. A copy: {result['ceilings']['copy_gb_per_s'] / 1e3:.2f} TB/s, read "
        f"and written, in the same run. Measured on {result['date']}{commit}. "
        f"torch {result['torch']}."
    )
    return "\n".join([*lines, "", conditions]) + "\n"


def draw_exchange(result: dict[str, Any], path: Path) -> None:
    """Save the times of dispatch and combine over tokens, and what their bytes take."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moe_engine"  # the same data give the same file
    from matplotlib import pyplot

    rows = uniform_rows(result)
    figure, axes = pyplot.subplots(figsize=(8, 3.6), facecolor=PAPER)
    for half in HALVES:
        taken = [types["bf16"][f"{half}_us"] for types in rows.values()]
        least = [types["bf16"]["copy_us"][half] for types in rows.values()]
        axes.plot(list(rows), taken, "o-", color=COLORS[half], label=half)
        axes.plot(list(rows), least, ":", color=COLORS[half], label=f"{half}'s bytes, copied")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(rows), [str(tokens) for tokens in rows])
    axes.set_xlabel("tokens a rank", color=INK)
    axes.set_ylabel("µs", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
