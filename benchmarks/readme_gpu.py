"""The README's results on a GPU, generated from the JSON between two markers of their own."""

from __future__ import annotations

from typing import Any

from benchmarks.peer import Peer

SECTION = "gpu-results"


def render_gpu(engine: dict[str, Any], peer: Peer, serving: dict[str, Any]) -> str:
    """Tables of decode steps and prefill, then the conditions, in Markdown.

    Args:
        engine: what `bench_engine` has saved.
        peer: of the same machine and workload.
        serving: what `bench_serving` has saved.
    """
    name = peer.peer
    lines = [
        f"| batch | step, ms | {name}, ms | faster | output tokens / s | floor, ms | "
        "share of the bandwidth |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in engine["decode"]:
        theirs = peer.decode_step_ms.get(str(row["batch"]))
        lines.append(
            f"| {row['batch']} | {row['step_ms']:.2f} | {_or_blank(theirs, '.2f')} | "
            f"{_ratio(theirs, row['step_ms'])} | {row['tok_per_s']:.0f} | {row['floor_ms']:.2f} | "
            f"{row['share_of_bandwidth']:.0%} |"
        )
    lines += [
        "",
        f"| prompts × tokens of a step | prompt tokens / s | {name} | faster |",
        "|---:|---:|---:|---:|",
    ]
    for row in engine["prefill"]:
        theirs = peer.prefill_tok_per_s.get(row["shape"])
        lines.append(
            f"| {row['shape'].replace('x', ' × ')} | {row['tok_per_s']:.0f} | "
            f"{_or_blank(theirs, '.0f')} | {_ratio(row['tok_per_s'], theirs)} |"
        )
    return "\n".join([*lines, "", _conditions(engine, peer, serving)]) + "\n"


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ratio(slower: float | None, faster: float | None) -> str:
    return "" if slower is None or faster is None else f"{slower / faster:.2f} ×"


def _conditions(engine: dict[str, Any], peer: Peer, serving: dict[str, Any]) -> str:
    """How and on what it was measured, in a paragraph."""
    ceilings, start = engine["ceilings"], engine["engine"]["startup_s"]
    summary, context = serving["summary"], engine["decode"][0]["mean_context"]
    return (
        f"One {ceilings['device']}, bfloat16, dummy weights, prompts of {peer.input} random "
        f"tokens, contexts of {context:.0f} on average. A step is the mean interval between tokens "
        "while the whole batch decodes; the floor is the time to read once what a step must read, "
        f"at the {ceilings['read_gb_per_s'] / 1e3:.2f} TB/s that the machine showed. {peer.peer} "
        "ran on the same machine with its own defaults. "
        f"Ready {sum(start.values()):.1f} s after the start of the process, "
        f"{start['weights']:.1f} s of it filling weights ({peer.peer}: {peer.start_s:.0f} s). "
        f"Over HTTP, {summary['online_share']:.0%} of the offline rate with {serving['streams']} "
        f"streams. torch {ceilings['torch']}, {engine['date']}."
    )
