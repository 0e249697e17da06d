"""Prints the engine's figures as tables, those of its peers beside them, and saves results."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peer import Peer

ROOT = Path(__file__).parents[1]


def save_result(
    path: Path, result: dict[str, Any], *, indent: int | None = 2, leave_out: str | None = None
) -> None:
    """Write a benchmark's JSON, with today's date and the commit; folders are made.

    Args:
        leave_out: a text that the file shall not hold, such as where the checkout is.
    """
    result = {"date": today(), "commit": commit()} | result
    text = json.dumps(result, indent=indent)
    if leave_out is not None:
        text = text.replace(leave_out, "")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    print(f"written to {path}", flush=True)


def today() -> str:
    """For results: 2026-11-24."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def commit(root: Path = ROOT) -> str | None:
    """The commit of a working tree, ``+changes`` behind it if a file in it differs; None: no tree.

    Files that git does not know do not count, nor does what benchmarks save themselves.
    """
    try:
        top, head = _git(root, "rev-parse", "--show-toplevel", "HEAD").split()
        if not Path(top).samefile(root):
            return None  # of a repository around this copy
        saved = ":(exclude)benchmarks/results"
        changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", saved)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changes else head


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def print_decode(rows: list[dict[str, Any]], peers: Sequence[Peer] = ()) -> None:
    """One line per batch size."""
    heads = "".join(f"  {peer.peer} ms   ratio" for peer in peers)
    print(
        f"\n{'batch':>5} {'step ms':>8} {'p99':>7} {'tok/s':>8} {'floor ms':>8} {'share':>6} "
        f"{'distinct':>8}{heads}"
    )
    for row in rows:
        line = (
            f"{row['batch']:5} {row['step_ms']:8.3f} {row['interval_ms']['p99']:7.2f} "
            f"{row['tok_per_s']:8.0f} {row['floor_ms']:8.2f} {row['share_of_bandwidth']:6.1%} "
            f"{row['distinct_tokens']:8.1%}"
        )
        for peer in peers:
            width = len(peer.peer) + 5
            theirs = peer.decode_step_ms.get(str(row["batch"]))
            figures = f"{theirs:.2f} {theirs / row['step_ms']:7.2f}" if theirs else ""
            line += f"{figures:>{width + 8}}"
        print(line.rstrip())


def print_prefill(rows: list[dict[str, Any]], peers: Sequence[Peer] = ()) -> None:
    """One line per shape of a step."""
    for row in rows:
        line = f"prefill {row['shape']:>8}: {row['tok_per_s']:9.0f} tok/s ({row['step_ms']:.1f} ms)"
        for peer in peers:
            theirs = peer.prefill_tok_per_s.get(row["shape"])
            if theirs:
                line += f"; {peer.peer} {theirs:.0f}, ratio {row['tok_per_s'] / theirs:.2f}"
        print(line)
