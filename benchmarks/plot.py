"""Draws the benchmarks' plots and rewrites the README's results: python -m benchmarks.plot

Needs matplotlib (the extra [bench]).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.peer import read_peer
from benchmarks.plot_timeline import draw_timeline
from benchmarks.readme_exchange import SECTION as EXCHANGE_SECTION
from benchmarks.readme_exchange import draw_exchange, render_exchange
from benchmarks.readme_gpu import PROMPT_STEPS_SECTION, render_gpu, render_prompt_steps
from benchmarks.readme_gpu import SECTION as GPU_SECTION
from benchmarks.readme_table import COLUMNS, SECTION, render_results, replace_section

ROOT = Path(__file__).parents[1]
SAVED = ROOT / "benchmarks" / "results"
RESULTS = SAVED / "engine_cpu.json"
GPU_RESULTS = SAVED / "engine_h200.json"
GPU_SERVING = SAVED / "serving_h200.json"
GPU_PROMPT_STEPS = SAVED / "prompt_steps_h200.json"
GPU_PEERS = "peer_*_h200.json"
EXCHANGE = SAVED / "exchange_virtual_h200.json"
EXCHANGE_PLOT = ROOT / "docs" / "images" / "exchange.svg"
PLOT = ROOT / "docs" / "images" / "engine_cpu.svg"
TIMELINE = SAVED / "step_timeline.json"
TIMELINE_PLOT = ROOT / "docs" / "images" / "step_timeline.svg"
README = ROOT / "README.md"

COLORS = ("#1f6feb", "#58a6ff", "#a5d0ff", "#bc8c00", "#e3c16f")
BAR_WIDTH = 0.16
INK = "#24292f"
PAPER = "#ffffff"


def main() -> None:
    """Bring plots and README up to date with the JSON."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    result = json.loads(RESULTS.read_text())
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    draw(result, PLOT)
    README.write_text(renewed_readme(README.read_text()))
    written = [PLOT, README]
    if TIMELINE.exists():  # as above
        draw_timeline(json.loads(TIMELINE.read_text()), TIMELINE_PLOT)
        written.append(TIMELINE_PLOT)
    if EXCHANGE.exists():
        draw_exchange(json.loads(EXCHANGE.read_text()), EXCHANGE_PLOT)
        written.append(EXCHANGE_PLOT)
    print(f"written: {', '.join(str(path.relative_to(ROOT)) for path in written)}")


def renewed_readme(readme: str) -> str:
    """The README with the results of the JSON."""
    readme = replace_section(readme, SECTION, render_results(json.loads(RESULTS.read_text())))
    if GPU_RESULTS.exists():  # it takes a GPU to make
        engine = json.loads(GPU_RESULTS.read_text())
        serving = json.loads(GPU_SERVING.read_text()) if GPU_SERVING.exists() else None
        peers = [read_peer(file) for file in sorted(SAVED.glob(GPU_PEERS))]
        readme = replace_section(readme, GPU_SECTION, render_gpu(engine, peers, serving))
    if GPU_PROMPT_STEPS.exists():  # likewise
        steps = render_prompt_steps(json.loads(GPU_PROMPT_STEPS.read_text()))
        readme = replace_section(readme, PROMPT_STEPS_SECTION, steps)
    if EXCHANGE.exists():
        exchange = render_exchange(json.loads(EXCHANGE.read_text()))
        readme = replace_section(readme, EXCHANGE_SECTION, exchange)
    return readme


def draw(result: dict[str, Any], path: Path) -> None:
    """Save bars of output tokens per second by batch size; the paper is white in any theme."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moe_engine"  # the same data give the same file
    from matplotlib import pyplot

    batches = result["batches"]
    figure, axes = pyplot.subplots(figsize=(8, 3.6), facecolor=PAPER)
    for place, (name, label) in enumerate(COLUMNS.items()):
        offset = (place - (len(COLUMNS) - 1) / 2) * BAR_WIDTH
        present = [i for i, batch in enumerate(batches) if name in batch["output_tokens_per_s"]]
        bars = axes.bar(
            [i + offset for i in present],
            [batches[i]["output_tokens_per_s"][name] for i in present],
            BAR_WIDTH,
            label=label,
            color=COLORS[place],
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1, color=INK)
    axes.set_xticks(range(len(batches)), [f"{batch['num_requests']}" for batch in batches])
    axes.set_xlabel("requests at once", color=INK)
    axes.set_ylabel("output tokens / s", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
