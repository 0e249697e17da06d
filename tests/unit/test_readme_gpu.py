"""The README's GPU section says what the JSON shows, and compares only what can be compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.peer import Peer
from benchmarks.readme_gpu import render_gpu, render_prompt_steps

STEP = {
    "batch": 8,
    "step_ms": 8.0,
    "tok_per_s": 1000.4,
    "floor_ms": 6.0,
    "share_of_bandwidth": 0.75,
    "mean_context": 705.0,
    "distinct_tokens": 1.0,
}
ENGINE: dict[str, Any] = {
    "date": "2026-01-02",
    "options": {"dtype": "bfloat16", "load_format": "dummy", "dummy_expert_skew": 0.0},
    "workload": {"input": 512, "output": 256, "temperature": 1.0, "repetitions": 3},
    "imports_s": 2.5,
    "start_s": 10.6,
    "ceilings": {"device": "NVIDIA H200", "torch": "2.11", "read_gb_per_s": 4340.0},
    "engine": {"startup_s": {"process and imports": 3.0, "weights": 1.5, "warm-up": 6.0}},
    "decode": [STEP, STEP | {"batch": 512, "distinct_tokens": 0.99996}],
    "prefill": [
        {"shape": "16x512", "tok_per_s": 90000.0, "seconds": {"8": [0.8] * 3, "1": [0.1] * 5}}
    ],
}
PEER = Peer("vLLM 1", "NVIDIA H200", "2026-01-03", 512, 99.0, {"8": 10.0}, {"16x512": 60000.0})
OTHER = Peer("Other 2", "NVIDIA H200", "2026-01-04", 512, 50.0, {"512": 4.0}, {})
SERVING: dict[str, Any] = {
    "date": "2026-01-05",
    "gpu": {"name": "NVIDIA H200"},
    "streams": 64,
    "summary": {"online_share": 0.97},
}


def conditions(**changes: Any) -> str:
    """The last paragraph, with parts of the engine's results replaced."""
    return render_gpu(ENGINE | changes, [PEER], SERVING).splitlines()[-1]


def test_results_stand_beside_the_peers_and_the_floor() -> None:
    lines = render_gpu(ENGINE, [PEER], SERVING).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 8
    assert lines[2] == "| 8 | 8.00 | 10.00 | 1.25 × | 1000 | 6.00 | 75% |"
    assert lines[3] == "| 512 | 8.00 |  |  | 1000 | 6.00 | 75% |"
    assert lines[7] == "| 16 × 512 | 90000 | 60000 | 1.50 × |"


def test_several_peers_have_columns_of_their_own() -> None:
    lines = render_gpu(ENGINE, [PEER, OTHER], SERVING).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 10
    assert lines[2] == "| 8 | 8.00 | 10.00 | 1.25 × |  |  | 1000 | 6.00 | 75% |"
    assert lines[3] == "| 512 | 8.00 |  |  | 4.00 | 0.50 × | 1000 | 6.00 | 75% |"
    assert lines[7] == "| 16 × 512 | 90000 | 60000 | 1.50 × |  |  |"
    for fact in ("vLLM 1, measured on 2026-01-03", "Other 2, measured on 2026-01-04", "Other 2 50"):
        assert fact in lines[-1]


def test_without_a_peer_the_engine_stands_alone() -> None:
    lines = render_gpu(ENGINE, [], SERVING).splitlines()
    assert lines[2] == "| 8 | 8.00 | 1000 | 6.00 | 75% |"
    assert lines[7] == "| 16 × 512 | 90000 |"
    assert "vLLM" not in lines[-1]


@pytest.mark.parametrize(
    "fact",
    [
        "One NVIDIA H200, bfloat16, dummy weights, prompts of 512",
        "in the second half of the outputs, where contexts are 705 tokens on average",
        "temperature 1; 99.9% or more of the tokens drawn in one step differ",
        "median of 3 repetitions, measured on 2026-01-02",
        "Prefill is the slope between 1 and 8 steps, medians of 5 and 3 repetitions.",
        "vLLM 1, measured on 2026-01-03: a step from the difference between the fastest",
        "prefill from medians.",
        "4.34 TB/s",
        "Ready after 2.5 s of imports and 10.6 s from `MoEEngine(...)` on, 1.5 s of them filling",
        "; vLLM 1 99 s, its imports among them",
        "97% of the offline rate with 64 streams (2026-01-05)",
        "torch 2.11",
    ],
)
def test_the_conditions_tell(fact: str) -> None:
    assert fact in conditions()


def test_the_conditions_follow_the_json() -> None:
    greedy = conditions(
        workload=ENGINE["workload"] | {"temperature": 0.0}, decode=ENGINE["decode"][:1]
    )
    assert "greedy; all tokens drawn in one step differ" in greedy
    skewed = conditions(options=ENGINE["options"] | {"dummy_expert_skew": 1.5})
    assert "dummy weights, tokens routed by Zipf's law with exponent 1.5, prompts" in skewed
    assert "Zipf" not in greedy
    assert "on 2026-01-02 at commit 12345ab+changes." in conditions(commit="12345abcdef+changes")
    old = conditions(prefill=[{"shape": "16x512", "tok_per_s": 90000.0}])
    assert "slope" not in old
    for state in ("empty", "filled"):
        start = f"from `MoEEngine(...)` on with Triton's cache of kernels {state}, 1.5 s of them"
        assert start in conditions(triton_cache=state)
    assert "Triton" not in old
    loaded = conditions(options=ENGINE["options"] | {"load_format": "auto"})
    assert "the checkpoint's weights" in loaded
    assert "dummy" not in loaded


def test_before_serving_is_measured_nothing_is_said_of_it() -> None:
    assert "HTTP" in render_gpu(ENGINE, [PEER], SERVING)
    text = render_gpu(ENGINE, [PEER], None)
    assert "HTTP" not in text
    assert text.endswith("its imports among them. torch 2.11.\n")


def test_figures_of_another_gpu_or_workload_are_refused() -> None:
    elsewhere = Peer("vLLM 1", "NVIDIA H100", "2026-01-03", 512, 99.0, {"8": 10.0}, {})
    with pytest.raises(ValueError, match=r"vLLM 1 ran on NVIDIA H100, the engine on NVIDIA H200"):
        render_gpu(ENGINE, [PEER, elsewhere], SERVING)
    for gpu in (None, {"name": "NVIDIA H100"}):
        with pytest.raises(ValueError, match="serving benchmark ran on"):
            render_gpu(ENGINE, [PEER], SERVING | {"gpu": gpu})
    longer = Peer("vLLM 1", "NVIDIA H200", "2026-01-03", 1024, 99.0, {"8": 10.0}, {})
    with pytest.raises(ValueError, match="prompts of 1024 tokens, the engine of 512"):
        render_gpu(ENGINE, [longer], SERVING)
    render_gpu(ENGINE, [replace(PEER, temperature=1.0)], SERVING)
    with pytest.raises(ValueError, match="vLLM 1 drew tokens at temperature 0, the engine at 1"):
        render_gpu(ENGINE, [replace(PEER, temperature=0.0)], SERVING)


def test_steps_with_prompts_are_a_table() -> None:
    row = {"prompts": 2, "tokens": 512, "decodes": 50}
    ways = {"engine": {"ms": 22.26, "host_ms": 2.31}, "launched": {"ms": 43.5, "host_ms": 42.0}}
    result = {
        "date": "2026-01-06",
        "gpu": {"name": "NVIDIA H200"},
        "torch": "2.11",
        "model": "some-model",
        "input": 300,
        "results": [row | ways],
    }
    lines = render_prompt_steps(result).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 6
    assert lines[2] == "| 2 × 512 | 50 | 22.3 | 2.3 | 43.5 |"
    for fact in ("One NVIDIA H200, some-model", "of 300 tokens", "2026-01-06", "torch 2.11"):
        assert fact in lines[-1]
