"""The exchange's kernels, dispatch and combine, against what their bytes must take.

    python -m benchmarks.bench_exchange --virtual --ranks 2 --tokens 1,8,64,512,4096 \
        --hidden 4096 --experts 128 --topk 8 --dtype bf16 --routing uniform --json FILE

All ranks are virtual, side by side on one GPU, each in a stream and a graph of its own. Before a
case is timed its bits are compared with the reference's. A time is the slowest rank's, of one
exchange of a graph of several; dispatch by itself, and combine as what a whole exchange takes more.
`eager` is the same launched one by one. The tokens of neighbouring exchanges are different ones.

Bytes are those that must be read and written in the GPU's memory by all ranks together, that which
stays at its rank included; ``wire`` are those that leave a rank, what a real link would carry.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings
from benchmarks.gpu_state import gpu_state, require_gpu
from benchmarks.options import int_list
from benchmarks.report import save_result
from moe_engine.dist.exchange.base import Received
from moe_engine.dist.exchange.nvlink import (
    ExchangeShape,
    NvlinkDomain,
    NvlinkExchange,
    virtual_domains,
)
from moe_engine.ops.moe import ExpertOutputs
from moe_engine.ops.reference import exchange as reference
from moe_engine.ops.reference.exchange import Tokens

# Rows in fp8 come from bfloat16, become it again, and go back as bfloat16.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.bfloat16,
}
ROUTINGS = ("uniform", "zipf", "incast")
TRIALS = 200
WARM_UP_TRIALS = 5
EXCHANGES = 20  # of a graph
# That a trial's launches may take, for each rank, before the first of them runs.
GATE_CYCLES = 150_000
MOST_INPUT_BYTES = 2 << 30  # of the tokens that a graph's exchanges rotate through


def main() -> None:
    """Check, time, print and save."""
    arguments = parse_arguments()
    # A hardware queue for each rank's stream, and no kernel loaded while another one waits; both
    # are read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    require_gpu()
    found = ceilings.run("cuda")
    results = []
    for dtype in arguments.dtype:
        for routing in arguments.routing:
            for num_tokens in arguments.tokens:
                shape = ExchangeShape(
                    num_ranks=arguments.ranks,
                    num_experts=arguments.experts,
                    top_k=arguments.topk,
                    hidden=arguments.hidden,
                    dtype=DTYPES[dtype],
                    max_tokens=num_tokens,
                    packet_tokens=arguments.packet_tokens,
                    fp8=dtype == "fp8",
                )
                result = {"dtype": dtype, "routing": routing} | measure(shape, routing, found)
                results.append(result)
                report(result)
    if arguments.json:
        output = {
            "gpu": gpu_state(),
            "torch": torch.__version__,
            "ranks": arguments.ranks,
            "virtual": True,
            "hidden": arguments.hidden,
            "experts": arguments.experts,
            "topk": arguments.topk,
            "ceilings": found,
            "results": results,
        }
        save_result(arguments.json, output)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--virtual", action="store_true", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int_list, default=[1, 8, 64, 512, 4096])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--dtype", type=_names(DTYPES), default=["bf16"])
    parser.add_argument("--routing", type=_names(ROUTINGS), default=["uniform"])
    parser.add_argument("--packet-tokens", type=int, default=64, help="by packets up to so many")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def _names(allowed: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text}: it is of {', '.join(allowed)}")
        return names

    return parse


@dataclass(frozen=True)
class Rank:
    """What one rank needs to exchange again and again.

    Attributes:
        inputs: tokens for one exchange after the other.
        y_PH: what its experts have made of whatever they received.
    """

    domain: NvlinkDomain
    stream: torch.cuda.Stream
    inputs: list[Tokens]
    y_PH: torch.Tensor


def choose(shape: ExchangeShape, routing: str, num_tokens: int) -> torch.Tensor:
    """Expert ids [T, K]: all as likely, by Zipf's law, or all of rank 0."""
    scores_TE = torch.rand(num_tokens, shape.num_experts, device="cuda").log()
    if routing == "zipf":
        scores_TE *= torch.arange(1, shape.num_experts + 1, device="cuda")
    if routing == "incast":
        scores_TE = scores_TE[:, : shape.num_experts // shape.num_ranks]
    return scores_TE.topk(shape.top_k).indices.int()


def measure(shape: ExchangeShape, routing: str, found: dict[str, Any]) -> dict[str, Any]:
    """One case's times, in microseconds, and bytes."""
    ranks = make_ranks(shape, routing)
    check(shape, ranks)
    whole = [capture(rank, shape.max_tokens, exchange) for rank in ranks]
    first = [capture(rank, shape.max_tokens, dispatch_only) for rank in ranks]
    nothing = [capture(rank, shape.max_tokens, count_only) for rank in ranks]
    round_us = times_us(ranks, whole)
    counting = statistics.median(times_us(ranks, nothing))
    dispatch_us = [us - counting for us in times_us(ranks, first)]
    combine_us = statistics.median(round_us) - statistics.median(dispatch_us)
    bytes_moved = count_bytes(shape, ranks)
    copy_us = {name: n / ceilings.rate(found, "copy") * 1e6 for name, n in bytes_moved.items()}
    return {
        "tokens": shape.max_tokens,
        "kind": "packets" if shape.max_tokens <= shape.packet_tokens else "rows",
        "dispatch_us": statistics.median(dispatch_us),
        "dispatch_p99_us": statistics.quantiles(dispatch_us, n=100)[98],
        "combine_us": combine_us,
        "round_us": statistics.median(round_us),
        "round_p99_us": statistics.quantiles(round_us, n=100)[98],
        "eager_round_us": statistics.median(eager_us(shape, ranks)),
        "bytes": bytes_moved,
        "copy_us": copy_us,
    }


def make_ranks(shape: ExchangeShape, routing: str) -> list[Rank]:
    """All ranks, which bring as many tokens as they may."""
    torch.manual_seed(0)
    input_bytes = shape.max_tokens * shape.row_bytes * shape.num_ranks
    num_inputs = max(1, min(EXCHANGES, MOST_INPUT_BYTES // input_bytes))
    num_slots = shape.num_ranks * shape.max_tokens
    device = torch.device("cuda", torch.cuda.current_device())
    ranks = []
    for domain in virtual_domains(shape, device):
        inputs = [
            Tokens(
                torch.randn(shape.max_tokens, shape.hidden, device=device).to(shape.dtype),
                choose(shape, routing, shape.max_tokens),
                torch.rand(shape.max_tokens, shape.top_k, device=device),
            )
            for _ in range(num_inputs)
        ]
        y_PH = torch.empty(num_slots * shape.top_k, shape.hidden, dtype=shape.dtype, device=device)
        ranks.append(Rank(domain, torch.cuda.Stream(device), inputs, y_PH.normal_()))
    torch.cuda.synchronize()
    return ranks


def exchange(rank: Rank, step: NvlinkExchange, tokens: Tokens) -> torch.Tensor:
    """Dispatch and combine."""
    received = step.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK)
    return step.combine(outputs_of(rank, received), received)


def dispatch_only(rank: Rank, step: NvlinkExchange, tokens: Tokens) -> None:
    """Dispatch, and the next exchange's number, which else combine sets."""
    step.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK)
    count_only(rank, step, tokens)


def count_only(rank: Rank, step: NvlinkExchange, tokens: Tokens) -> None:
    """What `dispatch_only` does besides, to be left out of its time."""
    rank.domain._counters[:1].add_(1)


def outputs_of(rank: Rank, received: Received) -> ExpertOutputs:
    """The experts' outputs, which take no time here."""
    return ExpertOutputs(rank.y_PH, received.slot_ids_RK, received.weights_RK)


def capture(
    rank: Rank, step_tokens: int, run: Callable[[Rank, NvlinkExchange, Tokens], object]
) -> torch.cuda.CUDAGraph:
    """A graph of one rank's part of `EXCHANGES` exchanges."""
    step = NvlinkExchange(rank.domain, step_tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=rank.stream):
        for number in range(EXCHANGES):
            run(rank, step, rank.inputs[number % len(rank.inputs)])
    return graph


def times_us(ranks: Sequence[Rank], graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
    """Of each trial, the slowest rank's microseconds for one exchange."""

    def launch() -> list[Interval]:
        intervals = [Interval() for _ in ranks]
        for rank, graph, interval in zip(ranks, graphs, intervals, strict=True):
            with torch.cuda.stream(rank.stream):
                interval.start.record()
                graph.replay()
                interval.end.record()
        return intervals

    return trials_us(ranks, launch, EXCHANGES)


def eager_us(shape: ExchangeShape, ranks: Sequence[Rank]) -> list[float]:
    """The same of exchanges that are launched kernel by kernel."""
    steps = [NvlinkExchange(rank.domain, shape.max_tokens) for rank in ranks]

    def launch() -> list[Interval]:
        intervals = [Interval() for _ in ranks]
        received = []
        for rank, step, interval in zip(ranks, steps, intervals, strict=True):
            tokens = rank.inputs[0]
            with torch.cuda.stream(rank.stream):
                interval.start.record()
                received.append(step.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK))
        for rank, step, arrived in zip(ranks, steps, received, strict=True):
            with torch.cuda.stream(rank.stream):
                step.combine(outputs_of(rank, arrived), arrived)
        for rank, interval in zip(ranks, intervals, strict=True):
            with torch.cuda.stream(rank.stream):
                interval.end.record()
        return intervals

    return trials_us(ranks, launch, 1)


class Interval:
    """Two moments of a stream."""

    def __init__(self) -> None:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))


def trials_us(
    ranks: Sequence[Rank], launch: Callable[[], list[Interval]], num_exchanges: int
) -> list[float]:
    """The slowest rank's microseconds for one of the exchanges that ``launch`` enqueues.

    The ranks begin together, when all has been enqueued.
    """
    gate = torch.cuda.Stream()
    trials = []
    for _ in range(TRIALS + WARM_UP_TRIALS):
        opened = torch.cuda.Event()
        with torch.cuda.stream(gate):
            torch.cuda._sleep(GATE_CYCLES * len(ranks))
            opened.record()
        for rank in ranks:
            rank.stream.wait_event(opened)
        intervals = launch()
        torch.cuda.synchronize()
        for rank in ranks:
            rank.domain.check()
        longest = max(interval.start.elapsed_time(interval.end) for interval in intervals)
        trials.append(longest * 1e3 / num_exchanges)
    return trials[WARM_UP_TRIALS:]


def check(shape: ExchangeShape, ranks: Sequence[Rank]) -> None:
    """Raises `SystemExit` unless the first exchange gives the reference's bits."""
    received, outputs = [], []
    steps = [NvlinkExchange(rank.domain, shape.max_tokens) for rank in ranks]
    for rank, step in zip(ranks, steps, strict=True):
        tokens = rank.inputs[0]
        with torch.cuda.stream(rank.stream):
            received.append(step.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK))
    for rank, step, arrived in zip(ranks, steps, received, strict=True):
        with torch.cuda.stream(rank.stream):
            outputs.append(step.combine(outputs_of(rank, arrived), arrived))
    torch.cuda.synchronize()
    for rank in ranks:
        rank.domain.check()
    tokens_of = [rank.inputs[0] for rank in ranks]
    arrivals = reference.dispatch(tokens_of, shape.num_experts, shape.max_tokens, fp8=shape.fp8)
    sums = [reference.presum(r.y_PH, a) for r, a in zip(ranks, arrivals, strict=True)]
    expected = reference.combine(sums, tokens_of, shape.num_experts, shape.max_tokens)
    for number, (out_TH, right_TH) in enumerate(zip(outputs, expected, strict=True)):
        if not torch.equal(out_TH, right_TH):
            raise SystemExit(f"rank {number} has other bits than the reference: {shape}")


def count_bytes(shape: ExchangeShape, ranks: Sequence[Rank]) -> dict[str, int]:
    """Of one exchange, as the module says."""
    num_local = shape.num_experts // shape.num_ranks
    moved = {"dispatch": 0, "combine": 0, "wire_dispatch": 0, "wire_combine": 0}
    row, wire = shape.row_bytes, shape.wire_bytes
    for home, rank in enumerate(ranks):
        ids_TK = rank.inputs[0].ids_TK
        goes_TN = torch.zeros(len(ids_TK), shape.num_ranks, dtype=torch.bool, device="cuda")
        goes_TN.scatter_(1, (ids_TK // num_local).long(), True)
        copies = int(goes_TN.sum())
        leaving = copies - int(goes_TN[:, home].sum())
        num_tokens = len(ids_TK)
        # Rows that travel in 8 bits are read and written once more, where they arrive.
        restored = copies * (wire + row) if shape.fp8 else 0
        moved["dispatch"] += num_tokens * row + copies * wire + restored
        moved["combine"] += (ids_TK.numel() + 2 * copies + num_tokens) * row
        moved["wire_dispatch"] += leaving * wire
        moved["wire_combine"] += leaving * row
    return moved


def report(result: dict[str, Any]) -> None:
    """Print a case in a line."""
    times = {half: result[f"{half}_us"] for half in ("dispatch", "combine")}
    shares = " ".join(
        f"{half} {us:7.2f} us ({result['copy_us'][half] / us:.0%})" for half, us in times.items()
    )
    print(
        f"{result['dtype']} {result['routing']:7s} {result['tokens']:5d} tokens, {result['kind']}: "
        f"{shares}, round {result['round_us']:.2f} (p99 {result['round_p99_us']:.2f}), "
        f"eager {result['eager_round_us']:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
