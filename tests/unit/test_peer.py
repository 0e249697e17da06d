"""Another engine's figures: what a run's lines say, and when they say nothing."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peer import decode_steps_ms, from_lines, main, read_peer

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

# What vLLM 0.26.0 wrote on an H200. In the run of batch 8 two repetitions were disturbed.
INIT = {"what": "init", "vllm": "0.26.0", "gpu": "NVIDIA H200", "seconds": 122.5, "input": 512}
BATCH_1 = {
    "what": "decode",
    "batch": 1,
    "t": {"1": 0.0168, "129": 0.5531, "257": 1.0916},
    "raw": {"1": [0.0168, 0.0167], "129": [0.553, 0.5532], "257": [1.0918, 1.0913]},
    "step_ms": 4.1904,
    "steady_ms": 4.2065,
}
BATCH_8 = {
    "what": "decode",
    "batch": 8,
    "t": {"1": 0.8668, "129": 2.0587, "257": 2.4717},
    "raw": {"1": [1.6227, 0.1108], "129": [1.296, 2.8213], "257": [2.5122, 2.4312]},
    "step_ms": 9.3117,
    "steady_ms": 3.2266,
}
BATCH_256 = {
    "what": "decode",
    "batch": 256,
    "t": {"1": 1.8645, "129": 4.9721, "257": 8.0303},
    "raw": {"1": [1.8695, 1.8596], "129": [4.9762, 4.968], "257": [8.0323, 8.0283]},
    "step_ms": 24.2778,
    "steady_ms": 23.8923,
}
PREFILL = {"what": "prefill", "tokens_per_step": 8192, "prompt_len": 512, "slope_tok_s": 73447}
END = {"what": "end"}


def with_raw(**seconds: list[float]) -> list[dict[str, Any]]:
    """The lines of batch 8 with other repetitions; ``t129`` are those of 129 tokens."""
    line = copy.deepcopy(BATCH_8)
    line["raw"] |= {name.removeprefix("t"): values for name, values in seconds.items()}
    return [INIT, line]


def test_a_peers_lines_become_its_figures() -> None:
    peer = from_lines([INIT, BATCH_1, BATCH_256, PREFILL, END], "2026-11-24")
    assert (peer.peer, peer.device, peer.date) == ("vLLM 0.26.0", "NVIDIA H200", "2026-11-24")
    assert (peer.input, peer.start_s) == (512, 122.5)
    # (1.0913 - 0.553) / 128 and (8.0283 - 4.968) / 128 seconds.
    assert peer.decode_step_ms == {"1": 4.2055, "256": 23.9086}
    assert peer.prefill_tok_per_s == {"16x512": 73447}
    with pytest.raises(ValueError, match="no line"):
        from_lines([BATCH_1], "2026-11-24")


def test_the_file_keeps_the_workload_and_all_lines(tmp_path: Path, monkeypatch: Any) -> None:
    init = INIT | {"torch": "2.11.0+cu130", "reps": 3, "temperature": 1.0}
    lines = [init, BATCH_1, PREFILL | {"raw1": [0.12], "raw8": [0.9]}, END]
    jsonl, output = tmp_path / "vllm.jsonl", tmp_path / "new" / "peer.json"
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = f"peer {jsonl} {output} --date 2026-11-24"
    monkeypatch.setattr(sys, "argv", command.split())
    main()
    peer = read_peer(output)
    assert (peer.temperature, peer.repetitions, peer.torch) == (1.0, 3, "2.11.0+cu130")
    assert peer.raw == lines
    assert peer == from_lines(lines, "2026-11-24")


def test_what_a_run_does_not_say_is_left_out(tmp_path: Path) -> None:
    saved = from_lines([INIT, BATCH_1], "2026-11-24").to_json()
    assert {"temperature", "repetitions", "torch"}.isdisjoint(saved)
    del saved["raw"]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(saved))
    assert read_peer(old).raw is None
    assert read_peer(old).to_json() == saved
    read_peer(old).check_temperature(0.7)


def test_the_committed_peer_is_what_its_lines_say() -> None:
    peer = read_peer(RESULTS / "peer_vllm_h200.json")
    assert peer.raw is not None
    assert from_lines(peer.raw, peer.date) == peer


def test_another_temperature_is_refused() -> None:
    peer = from_lines([INIT | {"temp": 0.0}], "2026-11-24")
    peer.check_temperature(0.0)
    with pytest.raises(ValueError, match="temperature 0, the engine at 1: measure both"):
        peer.check_temperature(1.0)


def test_a_batch_whose_repetitions_disagree_is_left_out_and_named() -> None:
    lines = [INIT, BATCH_1, BATCH_8, BATCH_256]
    assert from_lines(lines, "2026-11-24").decode_step_ms.keys() == {"1", "256"}
    (reason,) = decode_steps_ms(lines)[1]
    assert re.search(r"batch 8, 129 tokens.*1\.296 s, 2\.8213 s.*repeat the run", reason)


def test_a_straggler_among_three_repetitions_does_no_harm() -> None:
    peer = from_lines(with_raw(t129=[1.3, 2.8213, 1.296]), "2026-11-24")
    assert peer.decode_step_ms == {"8": pytest.approx((2.4312 - 1.296) / 128 * 1e3, abs=1e-4)}


@pytest.mark.parametrize(
    "seconds",
    [
        [1.296],  # nothing shows that it is no hiccup
        [1.296, 1.63],
        [1.296, 1.63, 1.64],  # the fastest stands alone
        [2.8, 1.3, 1.38],
    ],
)
def test_a_fastest_repetition_without_another_beside_it_does_not_count(
    seconds: list[float],
) -> None:
    for length in ("t129", "t257"):
        steps_ms, (reason,) = decode_steps_ms(
            with_raw(**({"t129": [1.3, 1.3]} | {length: seconds}))
        )
        assert steps_ms == {}
        assert f"batch 8, {length[1:]} tokens" in reason


def test_up_to_a_quarter_apart_the_fastest_counts() -> None:
    peer = from_lines(with_raw(t129=[1.62, 1.296]), "2026-11-24")
    assert peer.decode_step_ms == {"8": pytest.approx((2.4312 - 1.296) / 128 * 1e3, abs=1e-4)}


def test_a_length_whose_repetitions_disagree_gives_way_to_a_shorter_one() -> None:
    disturbed = {"t1": [0.18, 0.17, 0.1108, 0.1125], "t129": [1.2556, 2.5324, 2.0871, 1.3616]}
    assert decode_steps_ms(with_raw(**disturbed)) == (
        {"8": pytest.approx((2.4312 - 0.1108) / 256 * 1e3, abs=1e-4)},
        [],
    )
    peer = from_lines([*with_raw(**disturbed), BATCH_1 | {"raw": BATCH_8["raw"]}], "2026-11-24")
    assert peer.unusual_lengths() == {"8": (1, 257)}
    disturbed["t129"], disturbed["t257"] = [1.3, 1.3], disturbed["t129"]
    steps_ms, (reason,) = decode_steps_ms(with_raw(**disturbed))
    assert steps_ms == {}
    assert "257 tokens" in reason


def test_only_the_two_longest_outputs_count() -> None:
    short_cache = {"what": "decode", "batch": 2, "raw": {"1": [0.5, 0.5], "65": [1.14, 1.14]}}
    no_room = {"what": "decode", "batch": 512, "raw": {"1": [9.0, 9.0]}}
    peer = from_lines([INIT, short_cache, no_room, *with_raw(t129=[1.3, 1.3])[1:]], "2026-11-24")
    assert peer.decode_step_ms == {"2": 10.0, "8": pytest.approx(8.8375)}


def test_committed_peers_can_be_read(tmp_path: Path) -> None:
    files = list(RESULTS.glob("peer_*.json"))
    assert files
    assert all(read_peer(file).decode_step_ms["1"] > 0 for file in files)
    other = tmp_path / "other.json"
    other.write_text('{"peer": "x"}')
    with pytest.raises(ValueError, match=r"other\.json"):
        read_peer(other)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["peer", str(tmp_path / "no.jsonl"), "out", "--date", "now"])
    with pytest.raises(SystemExit, match=r"cannot read .*no\.jsonl: .*No such file"):
        main()
