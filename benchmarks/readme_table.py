"""The README's results, generated from the JSON between two markers."""

from __future__ import annotations

from typing import Any

SECTION = "results"
ENGINE = "moe_engine_tp1_dp1"
COLUMNS = {
    ENGINE: "moe_engine, 1 rank",
    "moe_engine_tp2_dp1": "moe_engine, TP 2",
    "moe_engine_tp1_dp2": "moe_engine, DP 2",
    "transformers_padded": "transformers, padded batch",
    "transformers_one_by_one": "transformers, one by one",
}


def markers(section: str) -> tuple[str, str]:
    """What stands in the README before and after a generated section."""
    return f"<!-- {section}:begin -->", f"<!-- {section}:end -->"


def replace_section(readme: str, section: str, text: str) -> str:
    """The README with another text between a section's markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = markers(section)
    before, found_begin, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end or begin in after or end in after:
        raise ValueError(f"the README must hold {begin} and then {end}, once each")
    return f"{before}{begin}\n{text}{end}{after}"


def render_results(result: dict[str, Any]) -> str:
    """Table and conditions in Markdown."""
    lines = [
        "| requests | " + " | ".join(COLUMNS.values()) + " | best / best |",
        "|---:|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for batch in result["batches"]:
        rates = batch["output_tokens_per_s"]
        cells = [f"{rates[name]:.1f}" if name in rates else "" for name in COLUMNS]
        lines.append(
            f"| {batch['num_requests']} | " + " | ".join(cells) + f" | {speed_ratio(batch):.2f} |"
        )
    return "\n".join([*lines, "", _conditions(result)]) + "\n"


def speed_ratio(batch: dict[str, Any]) -> float:
    """The best rate of the engine's layouts over the best of transformers' ways."""
    rates = batch["output_tokens_per_s"]
    ours, theirs = (
        max(rate for name, rate in rates.items() if name.startswith(prefix))
        for prefix in ("moe_engine", "transformers")
    )
    return float(ours / theirs)


def widest_spread(batches: list[dict[str, Any]]) -> float:
    """The most that a way's slowest repetition took, over its fastest."""
    return max(
        max(seconds) / min(seconds) for batch in batches for seconds in batch["seconds"].values()
    )


def _conditions(result: dict[str, Any]) -> str:
    """How and on what it was measured, in a paragraph."""
    machine, model, ceilings = result["machine"], result["model"], result["ceilings"]
    check, first = result["check"], result["time_to_first_token"]["median_s"]
    batches = result["batches"]
    smallest, largest = batches[0], batches[-1]
    num_checked = sum(check["num_equal"].values())
    load = result["load_average"]
    return (
        f"Output tokens per second, median of {result['repetitions']} repetitions, of which the "
        f"slowest took up to {widest_spread(batches):.1f} times as long as the fastest; best / "
        "best divides moe_engine's best layout by transformers' best way. "
        f"{result['num_output_tokens']} output tokens per request, greedy, float32. "
        f"Model: random weights, {model['total_parameters'] / 1e6:.0f} M parameters, "
        f"{model['active_parameters'] / 1e6:.0f} M active ({model['num_hidden_layers']} layers, "
        f"hidden {model['hidden_size']}, {model['num_experts']} experts, top "
        f"{model['num_experts_per_tok']}). "
        f"Before timing, {num_checked} of {check['num_prompts'] * len(check['num_equal'])} outputs "
        "were equal to transformers' token by token. "
        f"Time to first token, 1 request of {result['time_to_first_token']['num_prompt_tokens']} "
        f"tokens: moe_engine {1e3 * first[ENGINE]:.0f} ms, transformers "
        f"{1e3 * first['transformers_padded']:.0f} ms. "
        f"Against the ceilings of the same run (copy {ceilings['copy_gb_per_s']:.1f} GB/s, float32 "
        f"matmul {1e3 * ceilings['matmul_tflop_per_s']:.0f} GFLOP/s), one rank reads weights at "
        f"{smallest['weight_gb_per_s'][ENGINE]:.1f} GB/s with 1 request and computes "
        f"{largest['gflops'][ENGINE]:.1f} GFLOP/s with {largest['num_requests']}. "
        f"{machine['cpu']}, {machine['num_cores']} cores (virtual machine), torch "
        f"{machine['torch']}, transformers {machine['transformers']}, {result['date']}; load "
        f"average {load['before'][0]} before and {load['after'][0]} after."
    )
