"""The exchange's kernels, dispatch and combine, against what their bytes must take.

    python -m benchmarks.bench_exchange --virtual --ranks 2 --tokens 1,8,64,512,4096 \
        --hidden 4096 --experts 128 --topk 8 --dtype bf16 --routing uniform --json FILE
    torchrun --nproc-per-node 2 -m benchmarks.bench_exchange --tokens 1,8,64,512,4096 --json FILE

Virtual ranks are side by side on one GPU, each in a stream and a graph of its own; under torchrun
each rank is a process with a GPU. Before a case is timed its bits are compared with the
reference's. A time is the slowest rank's, of one exchange of a graph of several; dispatch by
itself, and combine as what a whole exchange takes more; of packets also with the norm that follows,
in one launch with combine and in one of its own. `eager` is the same launched one by one.
The tokens of neighbouring exchanges are different ones, the experts' outputs the same; the L2 cache
is flushed before each trial.

Bytes are those that must be read and written in the GPUs' memory by all ranks together, that which
stays at its rank included; ``wire`` are those that leave a rank, what a real link would carry.
Virtual ranks are held against the time of a copy of these bytes, real ones against NCCL's
all-to-all of the same rows, and against the time that the busiest link takes at the rate of a large
copy.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import ceilings
from benchmarks.exchange_cases import DTYPES, ROUTINGS, busiest_bytes, count_bytes, count_copies
from benchmarks.exchange_ceilings import NCCL_NOTE, link_bytes_per_s, nccl_us
from benchmarks.exchange_ranks import (
    EPS,
    Rank,
    Ranks,
    RealRanks,
    VirtualRanks,
    add_norm,
    capture,
    count_only,
    dispatch_only,
    exchange,
    exchange_norm,
    exchange_then_norm,
    outputs_of,
)
from benchmarks.exchange_timing import eager_us, median_us, times_us
from benchmarks.gpu_state import gpu_state, require_gpu
from benchmarks.options import int_list
from benchmarks.report import save_result
from moe_engine.dist.exchange.domain import ExchangeShape
from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.ops.moe import MoEOutput, summed
from moe_engine.ops.norm import add_rms_norm
from moe_engine.ops.reference import exchange as reference
from moe_engine.ops.reference.exchange import Tokens

T = TypeVar("T")


def main() -> None:
    """Check, time, print and save."""
    arguments = parse_arguments()
    # A hardware queue for each rank's stream, and no kernel loaded while another one waits; both
    # are read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    require_gpu()
    if arguments.virtual:
        on_virtual_ranks(arguments)
    else:
        on_real_ranks(arguments)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--virtual", action="store_true", help="all ranks on one GPU")
    parser.add_argument("--ranks", type=int, help="virtual ones, 2 if not given")
    parser.add_argument("--tokens", type=int_list, default=[1, 8, 64, 512, 4096])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--dtype", type=_names(DTYPES), default=["bf16"])
    parser.add_argument("--routing", type=_names(ROUTINGS), default=["uniform"])
    parser.add_argument(
        "--packet-tokens", type=int, help="by packets up to so many; else as the GPU's table says"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.virtual:
        arguments.ranks = arguments.ranks or 2
    elif arguments.ranks is not None:
        parser.error("--ranks is for --virtual; torchrun says how many real ones there are")
    return arguments


def _names(allowed: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text}: it is of {', '.join(allowed)}")
        return names

    return parse


def on_virtual_ranks(arguments: argparse.Namespace) -> None:
    """All cases, against copies."""
    found = ceilings.run("cuda")
    world = VirtualRanks(arguments.ranks)
    results = []
    for case, shape in cases(arguments, world.size):
        ranks = world.make(shape, case["routing"])
        result = case | measure(world, ranks, shape)
        rate = ceilings.rate(found, "copy")
        result["copy_us"] = {name: n / rate * 1e6 for name, n in result["bytes"].items()}
        results.append(result)
        report(result, result["copy_us"], "")
    save(arguments, {"ranks": world.size, "virtual": True, "ceilings": found}, results)


def on_real_ranks(arguments: argparse.Namespace) -> None:
    """All cases, against NCCL and the link; rank 0 reports."""
    world = RealRanks.join()
    link = world.first_alone(link_bytes_per_s)
    results = []
    for case, shape in cases(arguments, world.size):
        [rank] = world.make(shape, case["routing"])
        result = case | measure(world, [rank], shape)
        copies = [world.all_values([count_copies(shape, tokens.ids_TK)]) for tokens in rank.inputs]
        busiest = busiest_bytes(shape, copies[0])
        result["link_us"] = {name: n / link["one_way"] * 1e6 for name, n in busiest.items()}
        result["link_share"] = {
            half: us / result[f"{half}_us"] for half, us in result["link_us"].items()
        }
        result["nccl"] = nccl = nccl_us(world, rank, shape, copies)
        results.append(result)
        if world.number == 0:
            theirs = f", NCCL {nccl['dispatch_us']:.2f} + {nccl['combine_us']:.2f}"
            report(result, result["link_us"], theirs)
    if world.number == 0:
        kind = {
            "ranks": world.size,
            "virtual": False,
            "link_bytes_per_s": link,
            "nccl": {"version": torch.cuda.nccl.version(), "note": NCCL_NOTE},
        }
        save(arguments, kind, results)
    world.leave()


def cases(
    arguments: argparse.Namespace, num_ranks: int
) -> list[tuple[dict[str, str], ExchangeShape]]:
    """Those of the command line: by name, and what their buffers are made for."""
    device = torch.device("cuda", 0)
    ranks_per_gpu = num_ranks if arguments.virtual else 1

    def shape_of(dtype: str, num_tokens: int) -> ExchangeShape:
        shape = ExchangeShape(
            num_ranks=num_ranks,
            num_experts=arguments.experts,
            top_k=arguments.topk,
            hidden=arguments.hidden,
            dtype=DTYPES[dtype],
            max_tokens=num_tokens,
            packet_tokens=arguments.packet_tokens or 0,
            fp8=dtype == "fp8",
        )
        if arguments.packet_tokens is None:
            shape = shape.with_measured_limits(device, ranks_per_gpu)
        return replace(shape, apart_tokens=0)  # both are timed

    return [
        ({"dtype": dtype, "routing": routing}, shape_of(dtype, num_tokens))
        for dtype in arguments.dtype
        for routing in arguments.routing
        for num_tokens in arguments.tokens
    ]


def measure(world: Ranks, ranks: list[Rank], shape: ExchangeShape) -> dict[str, Any]:
    """One case's times, in microseconds, and bytes (a collective)."""
    check(world, ranks, shape)
    whole, first, nothing = (
        [capture(rank, shape.max_tokens, run).replay for rank in ranks]
        for run in (exchange, dispatch_only, count_only)
    )
    round_us = times_us(world, ranks, whole)
    counting = median_us(world, ranks, nothing)
    dispatch_us = [us - counting for us in times_us(world, ranks, first)]
    combine_us = statistics.median(round_us) - statistics.median(dispatch_us)
    with_norm_us = {}
    if goes_by_packets(shape):
        for name, run in (("norm", exchange_norm), ("then_norm", exchange_then_norm)):
            normed = [capture(rank, shape.max_tokens, run).replay for rank in ranks]
            normed_us = median_us(world, ranks, normed) - statistics.median(dispatch_us)
            with_norm_us[f"combine_{name}_us"] = normed_us
    copies = world.all_values([count_copies(shape, rank.inputs[0].ids_TK) for rank in ranks])
    return {
        "tokens": shape.max_tokens,
        "kind": "packets" if goes_by_packets(shape) else "rows",
        "dispatch_us": statistics.median(dispatch_us),
        "dispatch_p99_us": statistics.quantiles(dispatch_us, n=100)[98],
        "combine_us": combine_us,
        **with_norm_us,
        "round_us": statistics.median(round_us),
        "round_p99_us": statistics.quantiles(round_us, n=100)[98],
        "eager_round_us": statistics.median(eager_us(world, ranks, shape)),
        "bytes": count_bytes(shape, copies),
    }


def goes_by_packets(shape: ExchangeShape) -> bool:
    """Rather than by rows."""
    return shape.max_tokens <= shape.packet_tokens


def exchange_once(
    ranks: list[Rank], shape: ExchangeShape, finish: Callable[[Rank, MoEOutput], T]
) -> list[T]:
    """What each rank takes from its combine of the first tokens (a collective)."""
    received, outputs = [], []
    steps = [NvlinkExchange(rank.domain, shape.max_tokens) for rank in ranks]
    for rank, step in zip(ranks, steps, strict=True):
        tokens = rank.inputs[0]
        with torch.cuda.stream(rank.stream):
            received.append(step.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK))
    for rank, step, arrived in zip(ranks, steps, received, strict=True):
        with torch.cuda.stream(rank.stream):
            outputs.append(finish(rank, step.combine(outputs_of(rank, arrived), arrived)))
    torch.cuda.synchronize()
    for rank in ranks:
        rank.domain.check()
    return outputs


def check(world: Ranks, ranks: list[Rank], shape: ExchangeShape) -> None:
    """Raises `SystemExit` unless the first exchange gives the reference's bits (a collective).

    With a norm, the bits of the residual stream, and all but those of the norm.
    """
    outputs = exchange_once(ranks, shape, lambda _, combined: summed(combined))
    own = [rank.inputs[0] for rank in ranks]
    tokens_of = [
        Tokens(*parts)
        for parts in zip(
            world.all_tensors([tokens.x_TH for tokens in own]),
            world.all_tensors([tokens.ids_TK for tokens in own]),
            world.all_tensors([tokens.weights_TK for tokens in own]),
            strict=True,
        )
    ]
    arrivals = reference.dispatch(tokens_of, shape.num_experts, shape.max_tokens, fp8=shape.fp8)
    sums = world.all_tensors([reference.presum(r.y_PH, arrivals[r.number]) for r in ranks])
    expected = reference.combine(sums, tokens_of, shape.num_experts, shape.max_tokens)
    for rank, out_TH in zip(ranks, outputs, strict=True):
        if not torch.equal(out_TH, expected[rank.number]):
            raise SystemExit(f"rank {rank.number} has other bits than the reference: {shape}")
    if not goes_by_packets(shape):
        return
    for rank, out_TH, (normed_TH, stream_TH) in zip(
        ranks, outputs, exchange_once(ranks, shape, add_norm), strict=True
    ):
        right_TH, right_stream_TH = add_rms_norm(out_TH, rank.residual_TH, rank.norm_weight_H, EPS)
        rtol = max(2 * torch.finfo(shape.dtype).eps, 1e-6)
        is_close = torch.allclose(normed_TH, right_TH, rtol=rtol, atol=2**-23)
        if not torch.equal(stream_TH, right_stream_TH) or not is_close:
            raise SystemExit(f"rank {rank.number} has another norm than the reference: {shape}")


def report(result: dict[str, Any], least_us: dict[str, float], others: str) -> None:
    """Print a case in a line.

    Args:
        least_us: what dispatch and combine take at the ceiling's rate.
        others: the times of others, to stand behind.
    """
    times = {half: result[f"{half}_us"] for half in ("dispatch", "combine")}
    shares = " ".join(
        f"{half} {us:7.2f} us ({least_us[half] / us:.0%})" for half, us in times.items()
    )
    if "combine_norm_us" in result:
        shares += " with norm {combine_norm_us:.2f} us (apart {combine_then_norm_us:.2f})".format(
            **result
        )
    print(
        f"{result['dtype']} {result['routing']:7s} {result['tokens']:5d} tokens, {result['kind']}: "
        f"{shares}, round {result['round_us']:.2f} (p99 {result['round_p99_us']:.2f}), "
        f"eager {result['eager_round_us']:.1f}{others}",
        flush=True,
    )


def save(
    arguments: argparse.Namespace, kind: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    """Write what has been measured, if it is asked for."""
    if arguments.json:
        output = {
            "gpu": gpu_state(),
            "torch": torch.__version__,
            "hidden": arguments.hidden,
            "experts": arguments.experts,
            "topk": arguments.topk,
        }
        save_result(arguments.json, output | kind | {"results": results})


if __name__ == "__main__":
    main()
