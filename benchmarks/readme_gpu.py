"""The README's results on a GPU, generated from the JSON between two markers of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.peer import Peer

SECTION = "gpu-results"
PROMPT_STEPS_SECTION = "gpu-prompt-steps"


def render_gpu(
    engine: dict[str, Any], peers: Sequence[Peer], serving: dict[str, Any] | None
) -> str:
    """Tables of decode steps and prefill, then the conditions, in Markdown.

    Args:
        engine: what `bench_engine` has saved.
        peers: of the same workload, on the same kind of GPU.
        serving: what `bench_serving` has saved, on the same kind of GPU; None: nothing yet.

    Raises:
        ValueError: the figures are not to be compared: another GPU, another length of prompts or
            another temperature.
    """
    _check_comparable(engine, peers, serving)
    their_ms = "".join(f" {peer.peer}, ms | faster |" for peer in peers)
    lines = [
        f"| batch | step, ms |{their_ms} output tokens / s | floor, ms | share of the bandwidth |",
        "|---:" * (5 + 2 * len(peers)) + "|",
    ]
    for row in engine["decode"]:
        theirs = [peer.decode_step_ms.get(str(row["batch"])) for peer in peers]
        ours = row["step_ms"]
        cells = "".join(f" {_or_blank(ms, '.2f')} | {_ratio(ms, ours)} |" for ms in theirs)
        lines.append(
            f"| {row['batch']} | {ours:.2f} |{cells} {row['tok_per_s']:.0f} | "
            f"{row['floor_ms']:.2f} | {row['share_of_bandwidth']:.0%} |"
        )
    their_rates = "".join(f" {peer.peer} | faster |" for peer in peers)
    lines += [
        "",
        f"| prompts × tokens of a step | prompt tokens / s |{their_rates}",
        "|---:" * (2 + 2 * len(peers)) + "|",
    ]
    for row in engine["prefill"]:
        rates = [peer.prefill_tok_per_s.get(row["shape"]) for peer in peers]
        cells = "".join(f" {_or_blank(r, '.0f')} | {_ratio(row['tok_per_s'], r)} |" for r in rates)
        lines.append(f"| {row['shape'].replace('x', ' × ')} | {row['tok_per_s']:.0f} |{cells}")
    return "\n".join([*lines, "", _conditions(engine, peers, serving)]) + "\n"


def render_prompt_steps(result: dict[str, Any]) -> str:
    """What `bench_prompt_steps` has saved: a table of steps, then the conditions, in Markdown."""
    lines = [
        "| prompts × tokens | beside decodes | step, ms | of which the host, ms "
        "| launched kernel by kernel, ms |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in result["results"]:
        ours, singly = row["engine"], row["launched"]
        lines.append(
            f"| {row['prompts']} × {row['tokens']} | {row['decodes']} | {ours['ms']:.1f} | "
            f"{ours['host_ms']:.1f} | {singly['ms']:.1f} |"
        )
    conditions = (
        f"One {result['gpu']['name']}, {result['model']}, dummy weights, decodes of prompts of "
        f"{result['input']} tokens; medians of steps on an idle device, from the plan to the "
        f"tokens on the host, measured on {result['date']}. torch {result['torch']}."
    )
    return "\n".join([*lines, "", conditions]) + "\n"


def _check_comparable(
    engine: dict[str, Any], peers: Sequence[Peer], serving: dict[str, Any] | None
) -> None:
    device, num_input = engine["ceilings"]["device"], engine["workload"]["input"]
    devices = {peer.peer: peer.device for peer in peers}
    if serving is not None:
        devices["the serving benchmark"] = serving["gpu"]["name"] if serving["gpu"] else "no GPU"
    for name, other in devices.items():
        if other != device:
            raise ValueError(f"{name} ran on {other}, the engine on {device}: measure both on one")
    for peer in peers:
        if peer.input != num_input:
            raise ValueError(
                f"{peer.peer} had prompts of {peer.input} tokens, the engine of {num_input}: "
                "measure both with the same"
            )
        peer.check_temperature(engine["workload"]["temperature"])


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ratio(slower: float | None, faster: float | None) -> str:
    return "" if slower is None or faster is None else f"{slower / faster:.2f} ×"


def _conditions(
    engine: dict[str, Any], peers: Sequence[Peer], serving: dict[str, Any] | None
) -> str:
    """How and on what it was measured, in a paragraph."""
    ceilings, start = engine["ceilings"], engine["engine"]["startup_s"]
    workload, options = engine["workload"], engine["options"]
    context = engine["decode"][0]["mean_context"]
    is_dummy, skew = options["load_format"] == "dummy", options["dummy_expert_skew"]
    weights = "dummy weights" if is_dummy else "the checkpoint's weights"
    if skew:
        weights += f", tokens routed by Zipf's law with exponent {skew:g}"
    temperature = workload["temperature"]
    sampling = f"temperature {temperature:g}" if temperature else "greedy"
    their_steps = "".join(
        f" {peer.peer}, measured on {peer.date}: a step from the difference between the fastest "
        f"repetitions of two lengths of output{_unusual_lengths(peer)}, prefill from medians."
        for peer in peers
    )
    their_starts = "".join(
        f"; {peer.peer} {peer.start_s:.0f} s, its imports among them" for peer in peers
    )
    over_http = "" if serving is None else _over_http(serving)
    return (
        f"One {ceilings['device']}, {options.get('dtype', 'auto')}, {weights}, prompts of "
        f"{workload['input']} random tokens, {sampling}; {_distinct(engine['decode'])}. A step is "
        "the mean interval between tokens in the second half of the outputs, where contexts are "
        f"{context:.0f} tokens on average; the median of {workload['repetitions']} repetitions, "
        f"measured on {engine['date']}{_commit(engine)}.{_prefill(engine['prefill'])}"
        f"{their_steps} The floor is the time to read once what a step must read, at the "
        f"{ceilings['read_gb_per_s'] / 1e3:.2f} TB/s at which the same run read. "
        f"Ready after {engine['imports_s']:.1f} s of imports and {engine['start_s']:.1f} s from "
        f"`MoEEngine(...)` on{_triton_cache(engine)}, {start['weights']:.1f} s of them filling "
        f"weights{their_starts}."
        f"{over_http} torch {ceilings['torch']}."
    )


def _commit(engine: dict[str, Any]) -> str:
    """What was measured; nothing where the JSON does not say."""
    commit = engine.get("commit")
    if commit is None:
        return ""
    revision, plus, changes = commit.partition("+")
    return f" at commit {revision[:7]}{plus}{changes}"


def _unusual_lengths(peer: Peer) -> str:
    """Where a peer's two lengths are other ones than everywhere else, in words."""
    return "".join(
        f" (at batch {batch} of {shorter} and {longer} tokens, because repetitions between them "
        "did not agree)"
        for batch, (shorter, longer) in peer.unusual_lengths().items()
    )


def _prefill(rows: list[dict[str, Any]]) -> str:
    """How prefill was measured, in a sentence; nothing where the JSON does not say."""
    seconds = rows[0].get("seconds") if rows else None
    if not seconds:
        return ""
    few, many = sorted(seconds, key=int)
    return (
        f" Prefill is the slope between {few} and {many} steps, medians of {len(seconds[few])} and "
        f"{len(seconds[many])} repetitions."
    )


def _triton_cache(engine: dict[str, Any]) -> str:
    """Whether kernels were compiled before the start; nothing where the JSON does not say."""
    state = engine.get("triton_cache")
    return "" if state is None else f" with Triton's cache of kernels {state}"


def _over_http(serving: dict[str, Any]) -> str:
    """What serving costs, in a sentence."""
    return (
        f" Over HTTP, {serving['summary']['online_share']:.0%} of the offline rate with "
        f"{serving['streams']} streams ({serving['date']})."
    )


def _distinct(rows: list[dict[str, Any]]) -> str:
    """How many of the tokens that are drawn at once differ, at the least; rounded down."""
    least = min(row["distinct_tokens"] for row in rows)
    if least == 1:
        return "all tokens drawn in one step differ"
    return f"{math.floor(least * 1000) / 10:g}% or more of the tokens drawn in one step differ"
