"""Prints the engine's figures as tables, those of its peers beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.peer import Peer


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
