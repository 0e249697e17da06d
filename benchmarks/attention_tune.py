"""Candidates for the launch tables of the attention kernels, timed one against the other.

Each is compared with float32 before it is timed, and the run ends if one is wrong.

A decode's tiles decide its output's bits, so one row of tiles must serve every batch; its splits
and stages may differ from batch to batch. So the table has the best launch for each kind of tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from benchmarks import attention_cases as cases
from benchmarks.gpu_timing import errors_of_fit, num_rotations, seconds_per_call
from moe_engine.kernels.launch import supports_pdl
from moe_engine.kernels.norm_rope import norm_rope_write
from moe_engine.kernels.paged_decode import paged_decode
from moe_engine.kernels.paged_decode_table import DecodeLaunch, DecodeTiles
from moe_engine.kernels.paged_prefill import paged_prefill
from moe_engine.kernels.paged_prefill_table import PrefillTiles

REPLAYS = 5
COMPILERS = 12
# (tiles, stages that fit into shared memory)
DECODE_TILES = (
    (DecodeTiles(64, 4, 16), (3, 4, 6)),
    (DecodeTiles(64, 8, 16), (3, 4, 6)),
    (DecodeTiles(128, 8, 16), (2, 3)),
    (DecodeTiles(32, 4, 16), (4, 6)),
)
# (batch, context, (splits, least tokens a program))
DECODE_CASES: tuple[tuple[int, int | str, tuple[tuple[int, int], ...]], ...] = (
    (1, 576, ((16, 64), (8, 64), (16, 128))),
    (1, 2048, ((16, 64), (8, 64))),
    (8, 576, ((16, 64), (16, 128), (4, 64), (2, 64))),
    (8, 2048, ((16, 64), (8, 64), (4, 64))),
    (32, 576, ((1, 1), (2, 64), (4, 64), (16, 64))),
    (32, 2048, ((1, 1), (2, 64), (4, 64))),
    (64, 576, ((1, 1), (4, 2048), (2, 64))),
    (64, 2048, ((1, 1), (2, 64))),
    (64, "mixed", ((1, 1), (4, 1024), (8, 512))),
    (256, 576, ((1, 1), (4, 2048))),
    (256, 2048, ((1, 1),)),
    (256, "mixed", ((1, 1), (4, 2048))),
)
# Tiles called into L2 before the wait, tried with the best of the other constants.
NUM_PREFETCHED = (0, 1, 4)
PREFILL_TILES = (
    PrefillTiles(128, 64, 8, 3),
    PrefillTiles(128, 64, 8, 2),
    PrefillTiles(128, 128, 8, 2),
    PrefillTiles(128, 128, 8, 3),
    PrefillTiles(64, 64, 4, 3),
    PrefillTiles(64, 64, 4, 2),
    PrefillTiles(128, 32, 8, 3),
    PrefillTiles(256, 64, 16, 2),
)
PREFILL_CASES = {
    "16x512": [(512, 512)] * 16,
    "1x8192": [(8192, 8192)],
    "2048 after 6144": [(2048, 8192)],
}
# (heads a program, tokens a program, warps)
NORM_ROPE_LAUNCHES = (
    (8, 1, 1), (8, 1, 2), (16, 1, 2), (16, 1, 4), (64, 1, 8), (8, 2, 4), (8, 4, 4), (8, 8, 8),
    (16, 2, 8), (4, 8, 4),
)  # fmt: skip
NORM_ROPE_TOKENS = (1, 8, 64, 256, 8192)

Timed = dict[str, Any]
Step = tuple[cases.Inputs, cases.Projection]


def tune(cache: cases.Cache) -> list[Timed]:
    """Time all candidates; prints the best for each case and returns everything."""
    return [*_tune_norm_rope(cache), *_tune_decode(cache), *_tune_prefill(cache)]


def _compile(calls: Iterable[Callable[[], object]]) -> list[bool]:
    """Run each call once, many at a time, so that their kernels compile side by side.

    Returns:
        Which of them fit this GPU.
    """

    def attempt(call: Callable[[], object]) -> bool:
        try:
            call()
        except errors_of_fit() as error:
            print(f"left out: {type(error).__name__}: {str(error)[:120]}")
            return False
        return True

    with ThreadPoolExecutor(COMPILERS) as pool:
        works = list(pool.map(attempt, calls))
    torch.cuda.synchronize()
    return works


def _tune_decode(cache: cases.Cache) -> list[Timed]:
    use_pdl = supports_pdl(cache[0].device)
    inputs = {case[:2]: _decode_inputs(case[0], case[1]) for case in DECODE_CASES}

    def call(
        step: Step, tiles: DecodeTiles, launch: DecodeLaunch, last_arriver: bool
    ) -> Callable[[], torch.Tensor]:
        one, new = step
        out = torch.empty_like(one.q_TND)
        batch = one.batch
        prepare = (
            new.norms.q_weight_D, new.norms.k_weight_D, new.rope.cos_PF, new.rope.sin_PF,
            new.positions_T, batch.slots_T,
        )  # fmt: skip

        def run() -> torch.Tensor:
            paged_decode(
                new.qkv_TX, *cache, batch.block_tables_SB, batch.context_lens_S, cases.SCALE, out,
                prepare=prepare, eps=new.norms.eps, tiles=tiles, launch=launch,
                last_arriver=last_arriver, use_pdl=use_pdl,
            )  # fmt: skip
            return out

        return run

    def microseconds(
        case: tuple[int, int | str], tiles: DecodeTiles, launch: DecodeLaunch, last_arriver: bool
    ) -> float:
        calls = [call(step, tiles, launch, last_arriver) for step in inputs[case]]
        merge = "last" if last_arriver else "2nd"
        name = f"decode {case[0]} x {case[1]}, {tiles}, {launch}, {merge}"
        cases.check_attend(name, *inputs[case][0], cache, calls[0])
        return seconds_per_call(calls, REPLAYS) * 1e6

    smallest = inputs[(1, 576)][0]
    variants = [
        (tiles, num_stages, splits, last)
        for tiles, stages in DECODE_TILES
        for num_stages in stages
        for splits, last in ((1, True), (16, True), (16, False))
    ]
    call(smallest, DECODE_TILES[0][0], DecodeLaunch(16, 64), True)()
    works = _compile(
        call(smallest, tiles, DecodeLaunch(splits, 64, num_stages), last)
        for tiles, num_stages, splits, last in variants
    )
    working = {variant for variant, fine in zip(variants, works, strict=True) if fine}

    timed: list[Timed] = []
    print("decode, us: best of each tile x warps as (splits, least tokens, stages, merge)")
    for batch_size, context, splits in DECODE_CASES:
        columns = []
        for tiles, stages in DECODE_TILES:
            best: Timed | None = None
            for (num_splits, min_tokens), num_stages in itertools.product(splits, stages):
                for last in (True, False) if num_splits > 1 and batch_size <= 8 else (True,):
                    variant = (tiles, num_stages, 16 if num_splits > 1 else 1, last)
                    if variant not in working:
                        continue
                    launch = DecodeLaunch(num_splits, min_tokens, num_stages)
                    row = {
                        "kernel": "decode",
                        "case": [batch_size, context],
                        "tiles": [tiles.tile, tiles.num_warps],
                        "launch": [num_splits, min_tokens, num_stages, "last" if last else "2nd"],
                        "us": microseconds((batch_size, context), tiles, launch, last),
                    }
                    timed.append(row)
                    if best is None or row["us"] < best["us"]:
                        best, best_launch, best_last = row, launch, last
            if best is not None:
                for num_prefetched in NUM_PREFETCHED:
                    launch = replace(best_launch, num_prefetched=num_prefetched)
                    us = microseconds((batch_size, context), tiles, launch, best_last)
                    timed.append(best | {"num_prefetched": num_prefetched, "us": us})
                how = ",".join(map(str, best["launch"]))
                columns.append(f"{tiles.tile}x{tiles.num_warps} {best['us']:.1f} ({how})")
        print(f"{batch_size:>4} x {context:<6}", " | ".join(columns), flush=True)
    return timed


def _decode_inputs(batch_size: int, context: int | str) -> list[Step]:
    contexts = cases.decode_contexts(batch_size, context)
    num_bytes = sum(contexts) * cases.token_bytes(2)
    inputs = [
        cases.make_inputs([(1, length) for length in contexts])
        for _ in range(num_rotations(num_bytes))
    ]
    return list(zip(inputs, cases.make_projections(inputs), strict=True))


def _tune_prefill(cache: cases.Cache) -> list[Timed]:
    inputs = {name: cases.make_inputs(lens) for name, lens in PREFILL_CASES.items()}

    def call(one: cases.Inputs, tiles: PrefillTiles) -> Callable[[], torch.Tensor]:
        out = torch.empty_like(one.q_TND)
        batch = one.batch
        query_lens = [span.query_len for span in batch.prefills]

        def run() -> torch.Tensor:
            paged_prefill(
                one.q_TND, *cache, batch.block_tables_SB, batch.context_lens_S,
                batch.query_starts_S, 0, query_lens, cases.SCALE, out, tiles=tiles,
            )  # fmt: skip
            return out

        return run

    works = _compile(call(inputs["2048 after 6144"], tiles) for tiles in PREFILL_TILES)
    timed: list[Timed] = []
    print("prefill, us, by (rows, keys, warps, stages)")
    for tiles, fine in zip(PREFILL_TILES, works, strict=True):
        if not fine:
            continue
        shape = [tiles.rows, tiles.keys, tiles.num_warps, tiles.num_stages]
        columns = []
        for name, one in inputs.items():
            run = call(one, tiles)
            cases.check(f"prefill {name}, {tiles}", cases.worst_difference(one, cache, run()))
            us = seconds_per_call([run], REPLAYS) * 1e6
            columns.append(f"{name} {us:.0f}")
            timed.append({"kernel": "prefill", "case": name, "tiles": shape, "us": us})
        print(f"{shape!s:<20}", " | ".join(columns), flush=True)
    return timed


def _tune_norm_rope(cache: cases.Cache) -> list[Timed]:
    order = torch.randperm(cases.NUM_BLOCKS * cases.BLOCK_SIZE, device=cases.DEVICE)
    use_pdl = supports_pdl(cache[0].device)

    def call(new: cases.Projection, launch: tuple[int, int, int]) -> Callable[[], torch.Tensor]:
        norms, rope = new.norms, new.rope
        return lambda: norm_rope_write(
            new.qkv_TX, norms.q_weight_D, norms.k_weight_D, norms.eps, rope.cos_PF, rope.sin_PF,
            new.positions_T, *cache, order[: len(new.qkv_TX)], launch=launch, use_pdl=use_pdl,
        )  # fmt: skip

    (smallest,) = cases.make_token_projections(8, 1)
    works = _compile(call(smallest, launch) for launch in NORM_ROPE_LAUNCHES)
    timed: list[Timed] = []
    print("norm_rope_write, us, by (heads, tokens, warps), best four")
    for num_tokens in NORM_ROPE_TOKENS:
        count = num_rotations(2 * 2 * num_tokens * cases.projection_width())
        inputs = cases.make_token_projections(num_tokens, count)
        rows: list[Timed] = []
        for launch, fine in zip(NORM_ROPE_LAUNCHES, works, strict=True):
            if fine:
                calls = [call(new, launch) for new in inputs]
                name = f"norm_rope_write of {num_tokens} tokens, {launch}"
                cases.check_preparation(name, inputs[0], order[:num_tokens], cache, calls[0])
                us = seconds_per_call(calls, REPLAYS) * 1e6
                rows.append(
                    {"kernel": "norm_rope", "case": num_tokens, "launch": list(launch), "us": us}
                )
        rows.sort(key=lambda row: row["us"])
        best = " | ".join(f"{row['launch']} {row['us']:.2f}" for row in rows[:4])
        print(f"{num_tokens:>5} tokens", best, flush=True)
        timed += rows
    return timed
