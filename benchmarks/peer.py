"""Another engine's figures, to be printed beside ours.

    python -m benchmarks.peer JSONL OUTPUT --date YYYY-MM-DD

turns the lines that a vLLM run of the same workload has written (``what`` is init, decode, prefill)
into the file that ``benchmarks/results/peer_*.json`` holds and `bench_engine --peer` reads::

    {"peer": "vLLM 0.26.0", "device": "NVIDIA H200", "date": "2026-11-24", "input": 512,
     "start_s": 99.0, "decode_step_ms": {"1": 4.12, "8": 8.7},
     "prefill_tok_per_s": {"16x512": 70900, "1x8192": 55300}}
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Peer:
    """What another engine reached.

    Attributes:
        peer: name and version.
        device: name of the GPU.
        input: tokens of a prompt of the decode figures.
        start_s: seconds until it was ready.
        decode_step_ms: batch size -> milliseconds of a decode step.
        prefill_tok_per_s: ``prompts x length`` of a step -> prompt tokens per second.
    """

    peer: str
    device: str
    date: str
    input: int
    start_s: float
    decode_step_ms: dict[str, float]
    prefill_tok_per_s: dict[str, float]


def read_peer(path: Path) -> Peer:
    """A file of ``results/``.

    Raises:
        ValueError: it is not one.
    """
    try:
        return Peer(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a peer's figures: {error}") from error


def from_lines(lines: list[dict[str, Any]], date: str) -> Peer:
    """The figures in the lines of a vLLM run.

    Raises:
        ValueError: there is no ``init`` line.
    """
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_kind.setdefault(line["what"], []).append(line)
    if "init" not in by_kind:
        raise ValueError("no line says how the peer was started")
    init = by_kind["init"][-1]
    return Peer(
        peer=f"vLLM {init['vllm']}",
        device=init["gpu"],
        date=date,
        input=init["input"],
        start_s=init["seconds"],
        decode_step_ms={
            # A cache too short for the longer outputs leaves the figure that includes the ramp.
            str(line["batch"]): line["steady_ms" if "steady_ms" in line else "step_ms"]
            for line in by_kind.get("decode", [])
            if "steady_ms" in line or "step_ms" in line
        },
        prefill_tok_per_s={
            f"{line['tokens_per_step'] // line['prompt_len']}x{line['prompt_len']}": line[
                "slope_tok_s"
            ]
            for line in by_kind.get("prefill", [])
        },
    )


def main() -> None:
    """Convert a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("jsonl", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--date", required=True)
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.jsonl.read_text().splitlines() if line]
    peer = from_lines(lines, arguments.date)
    arguments.output.write_text(json.dumps(asdict(peer), indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
