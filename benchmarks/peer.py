"""Another engine's figures, to be printed beside ours.

    python -m benchmarks.peer JSONL OUTPUT --date YYYY-MM-DD

turns the lines that a vLLM run of the same workload has written into the file that
``benchmarks/results/peer_*.json`` holds and `bench_engine --peer` reads::

    {"peer": "vLLM 0.26.0", "device": "NVIDIA H200", "date": "2026-11-24", "input": 512,
     "start_s": 99.0, "decode_step_ms": {"1": 4.12, "8": 8.7},
     "prefill_tok_per_s": {"16x512": 70900, "1x8192": 55300},
     "temperature": 1.0, "repetitions": 3, "torch": "2.11.0", "raw": [{"what": "init", ...}, ...]}

The keys of the last line but ``raw``, which holds all that the run has written, are left out where
the run does not say; older files have none of them. The lines of a run, with seconds in ``raw``::

    {"what": "init", "vllm": "0.26.0", "gpu": "NVIDIA H200", "seconds": 99.0, "input": 512,
     "temperature": 1.0, "reps": 3, "torch": "2.11.0"}
    {"what": "decode", "batch": 1, "raw": {"129": [0.553, 0.5532], "257": [1.0918, 1.0913]}}
    {"what": "prefill", "tokens_per_step": 8192, "prompt_len": 512, "slope_tok_s": 70900}

A decode step is what lies between the fastest repetitions of the longest output and of the one
next in length whose repetitions agree, because a hiccup only ever adds time. Without them a batch
is left out, and the command says so: a hiccup in all that there are of the shorter output would
make the step look faster than it is.
Prefill is the slope that the run gives: between medians, of five or more repetitions of one step
and of three of eight.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Repetitions may exceed the fastest by this share of it.
SPREAD = 0.25
# Of three or more, stragglers do no harm once the two fastest are this close.
AGREEMENT = 0.05


@dataclass(frozen=True)
class Peer:
    """What another engine reached.

    Attributes:
        peer: name and version.
        device: name of the GPU.
        input: tokens of a prompt of the decode figures.
        start_s: seconds from before its imports until it was ready.
        decode_step_ms: batch size -> milliseconds of a decode step.
        prefill_tok_per_s: ``prompts x length`` of a step -> prompt tokens per second.
        temperature: at which tokens were drawn; None: not known, as below.
        repetitions: of a decode run, though long ones may have fewer.
        torch: version.
        raw: the lines of the run.
    """

    peer: str
    device: str
    date: str
    input: int
    start_s: float
    decode_step_ms: dict[str, float]
    prefill_tok_per_s: dict[str, float]
    temperature: float | None = None
    repetitions: int | None = None
    torch: str | None = None
    raw: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """What a file of ``results/`` holds: all that is known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def unusual_lengths(self) -> dict[str, tuple[int, int]]:
        """The outputs compared, by batch, where these are not the two longest of the run."""
        unusual = {}
        for line in self.raw or ():
            if line["what"] == "decode" and str(line["batch"]) in self.decode_step_ms:
                lengths = compared_lengths(line)
                if list(lengths) != sorted(map(int, line["raw"]))[-2:]:
                    unusual[str(line["batch"])] = lengths
        return unusual

    def check_temperature(self, temperature: float) -> None:
        """Refuse a comparison with another temperature, as far as the peer's is known.

        Raises:
            ValueError: they differ.
        """
        if self.temperature is not None and self.temperature != temperature:
            raise ValueError(
                f"{self.peer} drew tokens at temperature {self.temperature:g}, the engine at "
                f"{temperature:g}: measure both at the same"
            )


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

    A batch of which the cache held only one length of output, or of which the repetitions do not
    agree, has no decode figure.

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
        decode_step_ms=decode_steps_ms(lines)[0],
        prefill_tok_per_s={
            f"{line['tokens_per_step'] // line['prompt_len']}x{line['prompt_len']}": line[
                "slope_tok_s"
            ]
            for line in by_kind.get("prefill", [])
        },
        temperature=init.get("temperature", init.get("temp")),
        repetitions=init.get("reps"),
        torch=init.get("torch"),
        raw=lines,
    )


def decode_steps_ms(lines: list[dict[str, Any]]) -> tuple[dict[str, float], list[str]]:
    """Milliseconds of a step by batch, and why batches are left out."""
    steps_ms, reasons = {}, []
    for line in lines:
        if line["what"] == "decode" and len(line["raw"]) > 1:
            try:
                steps_ms[str(line["batch"])] = decode_step_ms(line)
            except ValueError as error:
                reasons.append(str(error))
    return steps_ms, reasons


def decode_step_ms(line: dict[str, Any]) -> float:
    """Milliseconds of a step, from a ``decode`` line with two or more lengths of output.

    Example: ``{"batch": 1, "raw": {"129": [0.553, 0.5532], "257": [1.0918, 1.0913]}}``:
    (1091.3 - 553) / 128 = 4.2055.

    Raises:
        ValueError: the repetitions of the longest or of all shorter ones do not agree.
    """
    shorter, longer = compared_lengths(line)
    seconds = min(line["raw"][str(longer)]) - min(line["raw"][str(shorter)])
    return round(seconds / (longer - shorter) * 1e3, 4)


def compared_lengths(line: dict[str, Any]) -> tuple[int, int]:
    """The two outputs that give a step: the longest, and the longest other one to be relied on.

    Raises:
        ValueError: as in `decode_step_ms`.
    """
    *others, longest = sorted(map(int, line["raw"]))
    check_repetitions(line, longest)
    reasons = []
    for length in reversed(others):
        try:
            check_repetitions(line, length)
            return length, longest
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; ".join(reasons))


def check_repetitions(line: dict[str, Any], length: int) -> None:
    """That others show that the fastest repetition of a ``decode`` line's length is no hiccup.

    Raises:
        ValueError: they differ by more than `SPREAD`, and there are no three of which the two
            fastest are within `AGREEMENT`; or there is only one.
    """
    seconds = line["raw"][str(length)]
    best, *others = sorted(seconds)
    is_steady = bool(others) and others[-1] <= (1 + SPREAD) * best
    has_stragglers_only = len(others) > 1 and others[0] <= (1 + AGREEMENT) * best
    if not (is_steady or has_stragglers_only):
        raise ValueError(
            f"batch {line['batch']}, {length} tokens: repetitions of "
            f"{', '.join(f'{s:g} s' for s in seconds)} do not show what a step takes; two or more "
            f"must all be within {SPREAD:.0%} of the fastest, or the two fastest of three or more "
            f"within {AGREEMENT:.0%} of each other; repeat the run"
        )


def main() -> None:
    """Convert a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("jsonl", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--date", required=True)
    arguments = parser.parse_args()
    try:
        lines = [json.loads(line) for line in arguments.jsonl.read_text().splitlines() if line]
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot read {arguments.jsonl}: {error}") from error
    peer = from_lines(lines, arguments.date)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(peer.to_json(), indent=2) + "\n")
    for reason in decode_steps_ms(lines)[1]:
        print(f"left out: {reason}")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
