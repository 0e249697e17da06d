"""Attention on one GPU: query and key preparation, decode and prefill, against measured ceilings.

    python -m benchmarks.bench_attention --json FILE          # check, then time what is committed
    python -m benchmarks.bench_attention --json FILE --tune   # time candidates for the tables
    python -m benchmarks.bench_attention --json FILE --launches 6:1:1,12:2:64
        # time decode from the projection on with these `ops.tuning.Launch`es

Heads are 128 wide, in bfloat16, and as many as Qwen3-30B-A3B has, 32 of queries and 4 of keys and
values, unless ``--heads`` and ``--kv-heads`` say otherwise: Qwen3-235B-A22B has 64 and 4, a rank of
four of it 16 and 1. Every kernel is checked against float32 attention first. The ceilings
(`benchmarks.ceilings`) are measured in the same run: decode is held against reading, prefill
against a matrix product, and the preparation of queries and keys, which writes as much as it reads,
against copying. Beside them stand other libraries' times, if those in
``benchmarks/results/attention_peers.json`` are of this GPU and these heads.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention_cases as cases
from benchmarks import ceilings
from benchmarks.attention_tune import tune
from benchmarks.forced_choices import forced_choices
from benchmarks.gpu_state import require_gpu
from benchmarks.gpu_timing import num_rotations, seconds_per_call
from benchmarks.machine import describe_machine
from benchmarks.options import launch_list, launch_name
from benchmarks.report import save_result
from moe_engine.kernels.launch import supports_pdl
from moe_engine.kernels.norm_rope import norm_rope_write
from moe_engine.kernels.paged_decode import paged_decode
from moe_engine.kernels.paged_prefill import paged_prefill
from moe_engine.ops import cudnn_prefill, prefill_attention
from moe_engine.ops.attention import attend, paged_attention
from moe_engine.ops.rope import norm_rope_write as norm_rope_write_operator
from moe_engine.ops.tuning import INF, DecodeChoices, Launch

BATCHES = (1, 8, 32, 64, 128, 256)
PREFILLS = {
    "16x512": [(512, 512)] * 16,
    "1x8192": [(8192, 8192)],
    "64x128": [(128, 128)] * 64,
    "64x32": [(32, 32)] * 64,
    "2048 after 6144": [(2048, 8192)],
    "1024 after 7168": [(1024, 8192)],
    "mixed": [(n, n) for n in (3000, 100, 700, 40, 1500, 260, 2000, 592)],
}
NORM_ROPE_TOKENS = (1, 8, 64, 256, 2048, 8192)
# Other libraries' figures, of one GPU and one number of heads.
PEERS = Path(__file__).parent / "results" / "attention_peers.json"

Row = dict[str, Any]
Cache = cases.Cache
Peers = dict[tuple[str, str], float]
"""Microseconds by operation and case."""


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--tune", action="store_true", help="time candidates for the tables")
    parser.add_argument("--heads", type=int, default=cases.NUM_HEADS, help="of queries")
    parser.add_argument("--kv-heads", type=int, default=cases.NUM_KV_HEADS)
    parser.add_argument(
        "--launches",
        type=launch_list,
        help="warps of a block (0: clusters):most shares:least tokens of a share, ...",
    )
    arguments = parser.parse_args()
    require_gpu()
    try:
        cases.set_heads(arguments.heads, arguments.kv_heads)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        sys.exit("bench_attention needs an NVIDIA GPU")
    torch.manual_seed(0)
    start = time.perf_counter()
    machine_ceilings = ceilings.run("cuda")
    cache = cases.make_cache()
    result: dict[str, Any] = {
        "machine": describe_machine() | {"gpu": torch.cuda.get_device_name()},
        "ceilings": machine_ceilings,
        "heads": arguments.heads,
        "kv_heads": arguments.kv_heads,
    }
    print(ceilings.describe(machine_ceilings))
    if arguments.tune:
        result["tune"] = tune(cache)
    elif arguments.launches:
        result["launches"] = launch_rows(arguments.launches, cache)
    else:
        device = machine_ceilings["device"]
        peers = read_peers(PEERS, device, arguments.heads, arguments.kv_heads)
        result["rows"] = measure(cache, machine_ceilings, peers)
    result["seconds"] = time.perf_counter() - start
    print(f"{result['seconds']:.0f} s in all")
    save_result(arguments.json, result)


def read_peers(path: Path, device: str, heads: int, kv_heads: int) -> Peers:
    """The figures of other libraries; none where they are of another GPU or other heads."""
    saved = json.loads(path.read_text())
    if (saved["device"], saved["heads"], saved["kv_heads"]) != (device, heads, kv_heads):
        return {}
    return {(row["operation"], row["case"]): row["us"] for row in saved["rows"]}


def measure(cache: Cache, machine_ceilings: dict[str, Any], peers: Peers) -> list[Row]:
    """Check and time every kernel as it is committed."""
    rows: list[Row] = []

    def add(row: Row) -> None:
        rate = row["bytes_per_s" if "bytes_per_s" in row else "flop_per_s"]
        row["share_of_ceiling"] = rate / ceilings.rate(machine_ceilings, row["ceiling"])
        peer = f"{row['peer_us']:7.1f}" if row.get("peer_us") else "      -"
        print(
            f"{row['kernel']:<22} {row['case']:<18} {row['us']:8.1f} us  peer {peer}  "
            f"{rate / 1e12:7.2f} T/s  {row['share_of_ceiling']:6.1%} of {row['ceiling']:<6} "
            f"error {row['error']:.1e}",
            flush=True,
        )
        rows.append(row)

    for num_tokens in NORM_ROPE_TOKENS:
        add(norm_rope_row(num_tokens, cache))
    for context in (576, 2048, "mixed"):
        for batch_size in BATCHES:
            peer = peers.get(("decode", f"{batch_size} x {context}"))
            add(decode_row(batch_size, context, cache, "decode", peer))
            for row in prepared_decode_rows(batch_size, context, cache):
                add(row)
    for how in ({"use_pdl": False}, {"last_arriver": False, "use_pdl": True}):
        name = "decode, no PDL" if "last_arriver" not in how else "decode, 2nd kernel"
        for batch_size in (1, 8):
            add(decode_row(batch_size, 576, cache, name, **how))
    narrow = (cache[0].to(torch.float8_e4m3fn), cache[1].to(torch.float8_e4m3fn))
    for batch_size in (64, 256):
        add(decode_row(batch_size, 576, narrow, "decode, fp8"))
    for name, lens in PREFILLS.items():
        for row in prefill_rows(name, lens, cache, peers.get(("prefill", name))):
            add(row)
        add(prepared_prefill_row(name, lens, cache))
    for length in (4352, 4608, 4864):
        print(f"cuDNN's first call of 1x{length}: {cudnn_first_call_ms(length, cache):.0f} ms")
    return rows


def norm_rope_row(num_tokens: int, cache: Cache) -> Row:
    """Preparation of T tokens: the projection's output is read once, q, k and v written once."""
    num_bytes = 2 * 2 * num_tokens * cases.projection_width()
    steps = cases.make_token_projections(num_tokens, num_rotations(num_bytes))
    order = torch.randperm(cases.NUM_BLOCKS * cases.BLOCK_SIZE, device=cases.DEVICE)
    use_pdl = supports_pdl(order.device)

    def prepare(index: int) -> torch.Tensor:
        new, norms, rope = steps[index], steps[index].norms, steps[index].rope
        return norm_rope_write(
            new.qkv_TX, norms.q_weight_D, norms.k_weight_D, norms.eps, rope.cos_PF, rope.sin_PF,
            new.positions_T, *cache, slots(index), use_pdl=use_pdl,
        )  # fmt: skip

    def slots(index: int) -> torch.Tensor:
        first = (index * num_tokens) % (len(order) - num_tokens)
        return order[first : first + num_tokens]

    name = f"norm_rope_write of {num_tokens} tokens"
    error = cases.check_preparation(name, steps[0], slots(0), cache, partial(prepare, 0))
    seconds = seconds_per_call([partial(prepare, index) for index in range(len(steps))])
    return {
        "kernel": "norm_rope_write",
        "case": f"{num_tokens} tokens",
        "us": seconds * 1e6,
        "bytes_per_s": num_bytes / seconds,
        "ceiling": "copy",
        "error": error,
    }


def decode_row(
    batch_size: int,
    context: int | str,
    cache: Cache,
    name: str,
    peer_us: float | None = None,
    **how: Any,
) -> Row:
    """Decode of a batch; ``how`` goes to the kernel, None: the operator."""
    contexts = cases.decode_contexts(batch_size, context)
    num_bytes = sum(contexts) * cases.token_bytes(cache[0].itemsize)
    inputs = [
        cases.make_inputs([(1, length) for length in contexts])
        for _ in range(num_rotations(num_bytes))
    ]

    def attend(one: cases.Inputs) -> torch.Tensor:
        if not how:
            return paged_attention(one.q_TND, cache, one.batch, cases.SCALE)
        out = torch.empty_like(one.q_TND)
        batch = one.batch
        paged_decode(
            one.q_TND, *cache, batch.block_tables_SB, batch.context_lens_S, cases.SCALE, out, **how
        )
        return out

    return {
        "kernel": name,
        "case": f"{batch_size} x {context}",
        "peer_us": peer_us,
        **_timed(inputs, cache, attend, num_bytes=num_bytes),
    }


def launch_rows(launches: list[Launch], cache: Cache) -> list[Row]:
    """Decode from the fused projection on by each launch, printed a line for each batch."""
    shape = cases.NUM_HEADS, cases.NUM_KV_HEADS
    rows: list[Row] = []
    for context in (576, 2048, "mixed"):
        for batch_size in BATCHES:
            columns = []
            for launch in launches:
                with forced_choices(cache[0].device, shape, DecodeChoices(((INF, launch),))):
                    row, _ = prepared_decode_rows(batch_size, context, cache)
                name = launch_name(launch)
                columns.append(f"{name} {row['us']:.1f}")
                rows.append(row | {"launch": name})
            print(f"{batch_size:>4} x {context:<6}", " | ".join(columns), flush=True)
    return rows


def prepared_decode_rows(batch_size: int, context: int | str, cache: Cache) -> list[Row]:
    """Decode from the fused projection on: in one launch, and in two that write the same bits."""
    contexts = cases.decode_contexts(batch_size, context)
    num_bytes = sum(contexts) * cases.token_bytes(cache[0].itemsize)
    inputs = [
        cases.make_inputs([(1, length) for length in contexts])
        for _ in range(num_rotations(num_bytes))
    ]
    steps = list(zip(inputs, cases.make_projections(inputs), strict=True))

    together = partial(_from_the_projection_on, cache)

    def prepare(one: cases.Inputs, new: cases.Projection) -> torch.Tensor:
        return norm_rope_write_operator(
            new.qkv_TX, new.norms.q_weight_D, new.norms.k_weight_D, new.norms.eps, new.rope,
            new.positions_T, cache, one.batch.slots_T,
        )  # fmt: skip

    def apart(one: cases.Inputs, new: cases.Projection) -> torch.Tensor:
        return paged_attention(prepare(one, new), cache, one.batch, cases.SCALE)

    error = cases.check_attend("decode", *steps[0], cache, partial(together, *steps[0]))
    # Whether it is made in one launch or in two, the cache holds the same bits.
    slots_T = inputs[0].batch.slots_T
    prepare(*steps[0])
    expected = [tensor.flatten(0, 1)[slots_T] for tensor in cache]
    cases.forget(slots_T, cache)
    together(*steps[0])
    for tensor, written in zip(cache, expected, strict=True):
        assert torch.equal(tensor.flatten(0, 1)[slots_T], written), "other bits are written"
    rows: list[Row] = []
    for name, way in (("prepare and decode", together), ("prepare, then decode", apart)):
        seconds = seconds_per_call([partial(way, *step) for step in steps])
        rows.append(
            {
                "kernel": name,
                "case": f"{batch_size} x {context}",
                "us": seconds * 1e6,
                "bytes_per_s": num_bytes / seconds,
                "ceiling": "read",
                "error": error,
            }
        )
    return rows


def _from_the_projection_on(cache: Cache, one: cases.Inputs, new: cases.Projection) -> torch.Tensor:
    return attend(new.qkv_TX, new.norms, new.rope, new.positions_T, cache, one.batch, cases.SCALE)


def prefill_rows(
    name: str, lens: list[tuple[int, int]], cache: Cache, peer_us: float | None
) -> list[Row]:
    """Prefill by the operator and by each kernel: ours for Hopper where it is taken, Triton's and,
    for equal whole prompts, cuDNN's."""
    inputs = [cases.make_inputs(lens) for _ in range(3)]
    own_kv = {id(one): one.own_kv(cache) for one in inputs}
    flop = prefill_flop(lens)

    def triton(one: cases.Inputs) -> torch.Tensor:
        out, batch = torch.empty_like(one.q_TND), one.batch
        query_lens = [span.query_len for span in batch.prefills]
        paged_prefill(
            one.q_TND, *cache, batch.block_tables_SB, batch.context_lens_S, batch.query_starts_S,
            0, query_lens, cases.SCALE, out,
        )  # fmt: skip
        return out

    def hopper(one: cases.Inputs) -> torch.Tensor:
        out, batch = torch.empty_like(one.q_TND), one.batch
        tiles = batch.prefill_tiles(
            prefill_attention.tile_tokens(cases.NUM_HEADS, cases.NUM_KV_HEADS)
        )
        prefill_attention.prefill_attention(
            one.q_TND, cache, batch.block_tables_SB, tiles, cases.SCALE, out
        )
        return out

    def cudnn(one: cases.Inputs) -> torch.Tensor:
        own_k_TGD, own_v_TGD = own_kv[id(one)]
        return cudnn_prefill.attend(
            one.q_TND, own_k_TGD, own_v_TGD, len(lens), lens[0][0], cases.SCALE
        )

    def operator(one: cases.Inputs) -> torch.Tensor:
        return paged_attention(one.q_TND, cache, one.batch, cases.SCALE, own_kv[id(one)])

    ways = {"prefill, operator": operator, "prefill, triton": triton}
    if prefill_attention.takes(torch.bfloat16, cases.NUM_HEADS, cache[0]):
        ways["prefill, hopper"] = hopper
    if set(lens) == {(lens[0][0], lens[0][0])}:
        ways["prefill, cudnn"] = cudnn
    return [
        {"kernel": kernel, "case": name, "peer_us": peer_us} | _timed(inputs, cache, way, flop=flop)
        for kernel, way in ways.items()
    ]


def prepared_prefill_row(name: str, lens: list[tuple[int, int]], cache: Cache) -> Row:
    """Prefill from the fused projection on: norms and rotation, the cache, attention."""
    inputs = [cases.make_inputs(lens) for _ in range(3)]
    steps = list(zip(inputs, cases.make_projections(inputs), strict=True))
    calls = [partial(_from_the_projection_on, cache, *step) for step in steps]
    error = cases.check_attend("prefill", *steps[0], cache, calls[0])
    seconds = seconds_per_call(calls)
    return {
        "kernel": "prepare and prefill",
        "case": name,
        "us": seconds * 1e6,
        "flop_per_s": prefill_flop(lens) / seconds,
        "ceiling": "matmul",
        "error": error,
    }


def prefill_flop(lens: list[tuple[int, int]]) -> float:
    """Of attention's two products."""
    return sum(
        4 * cases.NUM_HEADS * cases.HEAD_DIM * (query * context - query * (query - 1) / 2)
        for query, context in lens
    )


def _timed(
    inputs: list[cases.Inputs],
    cache: Cache,
    attend: Callable[[cases.Inputs], torch.Tensor],
    *,
    num_bytes: float | None = None,
    flop: float | None = None,
) -> Row:
    error = cases.worst_difference(inputs[0], cache, attend(inputs[0]))
    cases.check("attention", error)
    seconds = seconds_per_call([partial(attend, one) for one in inputs])
    rate: Row = {}
    if num_bytes is not None:
        rate |= {"bytes_per_s": num_bytes / seconds, "ceiling": "read"}
    if flop is not None:
        rate |= {"flop_per_s": flop / seconds, "ceiling": "matmul"}
    return {"us": seconds * 1e6, "error": error, **rate}


def cudnn_first_call_ms(length: int, cache: Cache) -> float:
    """What a shape that cuDNN has not seen costs the host."""
    one = cases.make_inputs([(length, length)])
    own_k_TGD, own_v_TGD = one.own_kv(cache)
    torch.cuda.synchronize()
    start = time.perf_counter()
    cudnn_prefill.attend(one.q_TND, own_k_TGD, own_v_TGD, 1, length, cases.SCALE)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
