"""Edge shapes of the CUDA kernels, each run once and compared with float32 on the CPU.

They are small, so that they can be run under a sanitizer (`sanitize_cuda`); `test_hopper` runs them
as tests. Nothing but the kernels themselves runs on the GPU: inputs are made on the CPU and copied.

Legend: R rows, K choices of a row, P = R * K pairs, E experts, H hidden size, I intermediate size,
X input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from moe_engine.ops import hopper, native
from moe_engine.ops.expert_counts import expert_token_counts
from moe_engine.ops.reference import expert_counts as counts_reference
from moe_engine.ops.reference import moe as reference
from moe_engine.ops.reference import norm as norm_reference
from tests.kernels.close import check_rows
from tests.kernels.decode_cases import (
    BLOCK_CASES,
    BLOCKS,
    CLUSTER_CASES,
    CLUSTERS,
    run_decode,
)
from tests.kernels.exchange_cases import EXCHANGE_CASES, run_exchange
from tests.kernels.prefill_cases import PREFILL_CASES, run_prefill

TILES = (16, 32, 64, 128, 256)
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Experts:
    """Which rows go to which experts, and the sizes."""

    name: str
    ids_RK: torch.Tensor
    num_experts: int
    hidden: int = 128
    intermediate: int = 128

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up and down of all experts, bfloat16 on the CPU."""
        gate_up_EJH = torch.randn(self.num_experts, 2 * self.intermediate, self.hidden)
        down_EHI = torch.randn(self.num_experts, self.hidden, self.intermediate)
        return (
            (gate_up_EJH / self.hidden**0.5).to(BF16),
            (down_EHI / self.intermediate**0.5).to(BF16),
        )


def one_expert_takes_all(num_pairs: int, **sizes: int) -> Experts:
    """The other four experts get nothing."""
    ids_RK = torch.full((num_pairs, 1), 3, dtype=torch.int32)
    return Experts(f"{num_pairs} pairs for one expert", ids_RK, 5, **sizes)


def no_rows(top_k: int) -> Experts:
    """A step in which nobody brings a token."""
    return Experts("no row", torch.empty(0, top_k, dtype=torch.int32), 4)


def scattered(num_rows: int, top_k: int, num_experts: int, **sizes: int) -> Experts:
    """Random experts; a row in five has none at some choices."""
    generator = torch.Generator().manual_seed(num_rows)
    shape = (num_rows, top_k)
    ids_RK = torch.randint(num_experts, shape, generator=generator, dtype=torch.int32)
    ids_RK[torch.rand(shape, generator=generator) < 0.2] = -1
    described = ", ".join(f"{name} {size}" for name, size in sizes.items())
    name = f"{num_rows} rows x {top_k} over {num_experts} experts {described}".strip()
    return Experts(name, ids_RK, num_experts, **sizes)


def foreseen(tile: int) -> Experts:
    """More experts than multiprocessors, so that blocks load weights before they know who has rows.

    Every third has a row, one has several tiles of them, the others have none.
    """
    ids_P = torch.arange(0, 300, 3, dtype=torch.int32)
    ids_P = torch.cat([ids_P, torch.full((200 + 2 * tile,), 33, dtype=torch.int32)])
    return Experts("weights foreseen", ids_P[:, None], 300, hidden=1088, intermediate=64)


def many_tiles() -> list[Experts]:
    """Of one step each, of the first or second product, a dozen or more for each block."""
    return [
        scattered(200, 3, 100, hidden=64, intermediate=1536),
        scattered(200, 3, 100, hidden=2048, intermediate=64),
    ]


def grouped_cases(tile: int) -> list[Experts]:
    """For tiles of ``tile`` pairs: none, one, around full tiles, and sizes that fit no tile."""
    return [
        no_rows(3),
        Experts("no expert at all", torch.full((7, 3), -1, dtype=torch.int32), 4),
        one_expert_takes_all(1),
        *(one_expert_takes_all(n, hidden=64, intermediate=64) for n in (tile - 1, tile)),
        one_expert_takes_all(2 * tile + 37, hidden=192, intermediate=320),
        scattered(13, 5, 7, hidden=320, intermediate=192),
        scattered(3, 2, 1024, hidden=64, intermediate=64),
        scattered(tile + 3, 3, 3, hidden=256, intermediate=128),
        foreseen(tile),
        *many_tiles(),
    ]


def sorting_cases() -> list[Experts]:
    """None, one, chunks of 64 that are full or not, the most pairs, the most experts."""
    return [
        no_rows(3),
        Experts("no expert at all", torch.full((7, 3), -1, dtype=torch.int32), 4),
        *(one_expert_takes_all(n) for n in (1, 31, 32, 33, 63, 64, 65, 1024)),
        scattered(8, 8, 128),
        scattered(13, 5, 7, hidden=320, intermediate=192),
        scattered(32, 8, 1024, hidden=64, intermediate=64),
        scattered(32, 8, 256, hidden=64, intermediate=64),
        scattered(128, 8, 256, hidden=64, intermediate=64),
        scattered(128, 8, 128, hidden=64, intermediate=64),
        scattered(17, 15, 131, hidden=64, intermediate=64),
        # As many pairs as experts: weights are foreseen.
        Experts(
            "weights foreseen", torch.arange(0, 512, 2, dtype=torch.int32)[:, None] % 254, 254,
            hidden=1088, intermediate=64,
        ),
    ]  # fmt: skip


STREAMING_CASES = [
    no_rows(8),
    Experts("no expert at all", torch.full((1, 8), -1, dtype=torch.int32), 4),
    scattered(1, 1, 1, hidden=64, intermediate=64),
    scattered(1, 8, 16, hidden=128, intermediate=64),
    # More blocks than elements; the most choices; rows in several pieces, the last of them short.
    scattered(1, 2, 3, hidden=64, intermediate=64),
    scattered(1, 32, 40, hidden=192, intermediate=448),
    scattered(3, 9, 5, hidden=2112, intermediate=64),
    scattered(2, 3, 4, hidden=64, intermediate=1536),
    # A block for each row.
    scattered(70, 2, 3, hidden=128, intermediate=64),
    Experts("one expert, chosen by all", torch.full((4, 2), 2, dtype=torch.int32), 3),
]

# (rows, X, O): the fewest and the most of each, and a last block that is not full.
LINEAR_CASES = [
    (1, 256, 1),
    (8, 256, 8),
    (9, 512, 1003),
    (16, 768, 2110),
    (5, 2048, 20),
    (0, 256, 8),
]

# (rows, X, O): the fewest and the most of each; the widths for which a warpgroup takes 64, 72 and
# 80 columns, with a last block that is not full; no row.
SPLIT_LINEAR_CASES = [
    (1, 512, 8),
    (17, 1024, 1000),
    (64, 2048, 4096),
    (33, 4096, 2304),
    (64, 2048, 5120),
    (63, 2048, 5000),
    (8, 66048, 24),
    (0, 1024, 40),
]


def run_grouped(case: Experts, tile: int, *, sorts: bool = False) -> None:
    """Every pair's output by the grouped kernel, from rows of x that lie apart.

    Args:
        sorts: whether the kernel sorts the pairs.
    """
    num_rows, top_k = case.ids_RK.shape
    x_RH = torch.randn(num_rows, case.hidden + 16).to(BF16)
    gate_up_EJH, down_EHI = case.weights()
    offsets_E1, pairs_P = reference.group_by_expert(case.ids_RK, case.num_experts)
    y_PH = hopper.grouped_expert_ffn(
        x_RH.cuda()[:, : case.hidden],
        case.ids_RK.cuda(),
        None if sorts else (offsets_E1.cuda(), pairs_P.cuda()),
        gate_up_EJH.cuda(),
        down_EHI.cuda(),
        tile,
    ).cpu()
    # Each pair that has an expert, as a row with one choice of weight 1.
    pairs = (case.ids_RK.flatten() >= 0).nonzero().flatten()
    expected = reference.expert_ffn(
        x_RH[pairs // top_k, : case.hidden].float(),
        case.ids_RK.flatten()[pairs, None],
        torch.ones(len(pairs), 1),
        gate_up_EJH.float(),
        down_EHI.float(),
    )
    check_rows(y_PH[pairs], expected)


def run_streaming(case: Experts) -> None:
    """The weighted sums by the streaming kernels, from rows of x that lie apart."""
    x_RH = torch.randn(len(case.ids_RK), case.hidden + 16).to(BF16)
    weights_RK = torch.rand(case.ids_RK.shape) + 0.1
    gate_up_EJH, down_EHI = case.weights()
    assert hopper.takes_streaming_experts(case.ids_RK.shape[1], down_EHI.cuda(), len(x_RH))
    out_RH = hopper.streaming_expert_ffn(
        x_RH.cuda()[:, : case.hidden],
        case.ids_RK.cuda(),
        weights_RK.cuda(),
        gate_up_EJH.cuda(),
        down_EHI.cuda(),
    ).cpu()
    expected_RH = reference.expert_ffn(
        x_RH[:, : case.hidden].float(),
        case.ids_RK,
        weights_RK,
        gate_up_EJH.float(),
        down_EHI.float(),
    )
    check_rows(out_RH, expected_RH)


def run_linear(num_rows: int, in_features: int, out_features: int) -> None:
    """A streaming linear layer, of rows of x that lie apart."""
    x_RX = torch.randn(num_rows, in_features + 16).to(BF16)
    weight_OX = (torch.randn(out_features, in_features) / in_features**0.5).to(BF16)
    x, weight = x_RX.cuda()[:, :in_features], weight_OX.cuda()
    assert hopper.takes_linear(x, weight)
    out_RO = hopper.linear(x, weight).cpu()
    check_rows(out_RO, x_RX[:, :in_features].float() @ weight_OX.float().t())


def run_split_linear(num_rows: int, in_features: int, out_features: int) -> None:
    """A split linear layer, of rows of x that lie apart."""
    x_RX = torch.randn(num_rows, in_features + 16).to(BF16)
    weight_OX = (torch.randn(out_features, in_features) / in_features**0.5).to(BF16)
    parts_SRO = hopper.split_linear(x_RX.cuda()[:, :in_features], weight_OX.cuda()).cpu()
    assert parts_SRO.shape[0] == in_features // 512
    check_rows(parts_SRO.sum(0).to(BF16), x_RX[:, :in_features].float() @ weight_OX.float().t())


@dataclass(frozen=True)
class Routing:
    """Sizes of a router behind a norm; num_parts 0: what is added comes whole."""

    num_rows: int
    num_real: int
    hidden: int
    num_experts: int
    top_k: int
    num_parts: int = 0
    normalize: bool = True


# No row, one, a tile and one more, padding, the fewest and the most columns, experts and choices.
ROUTER_CASES = [
    Routing(0, 0, 512, 16, 4),
    Routing(0, 0, 512, 16, 4, num_parts=2),
    Routing(1, 1, 2048, 128, 8, num_parts=8),
    Routing(7, 7, 512, 32, 2, num_parts=2),
    Routing(8, 8, 256, 8, 8),
    Routing(9, 9, 512, 24, 1, num_parts=1),
    Routing(64, 64, 2048, 128, 8, num_parts=8),
    Routing(40, 33, 4096, 128, 8, num_parts=4),
    Routing(9, 0, 1024, 256, 32, normalize=False),
    Routing(33, 20, 768, 72, 6, num_parts=3, normalize=False),
]


def run_norm_router(case: Routing) -> None:
    """Norm and router; the choice is judged by the logits of the norm that the kernel made."""
    rows, hidden = case.num_rows, case.hidden
    x = torch.randn(*([case.num_parts] if case.num_parts else []), rows, hidden)
    x = x if case.num_parts else x.to(BF16)
    residual_RH = torch.randn(rows, hidden).to(BF16)
    norm_weight_H = (1 + 0.3 * torch.randn(hidden)).to(BF16)
    gate_EH = (torch.randn(case.num_experts, hidden) / hidden**0.5).to(BF16)
    normed_RH, new_residual_RH, ids_RK, weights_RK = (
        tensor.cpu()
        for tensor in hopper.norm_router(
            x.cuda(),
            residual_RH.cuda(),
            norm_weight_H.cuda(),
            1e-6,
            gate_EH.cuda(),
            case.top_k,
            case.normalize,
            torch.tensor([case.num_real], dtype=torch.int32).cuda(),
        )
    )
    added_RH = x.float().sum(0).to(BF16) if case.num_parts else x
    expected_normed_RH, expected_RH = norm_reference.add_rms_norm(
        added_RH, residual_RH, norm_weight_H, 1e-6
    )
    torch.testing.assert_close(new_residual_RH, expected_RH, rtol=8e-3, atol=8e-3)
    torch.testing.assert_close(normed_RH, expected_normed_RH, rtol=2e-2, atol=2e-2)
    real = slice(0, case.num_real)
    probabilities_RE = (normed_RH.float() @ gate_EH.float().t()).softmax(dim=1)
    best_RK = probabilities_RE.topk(case.top_k, dim=1).values
    if case.normalize:
        best_RK /= best_RK.sum(dim=1, keepdim=True)
    chosen_RK = probabilities_RE.gather(1, ids_RK.long().clamp(min=0))
    assert all(len(set(row)) == case.top_k for row in ids_RK[real].tolist())
    # The kernel's logits are those of the norm before it is rounded.
    torch.testing.assert_close(weights_RK[real], best_RK[real], rtol=2e-2, atol=2e-3)
    if case.normalize:
        chosen_RK /= chosen_RK.sum(dim=1, keepdim=True)
    torch.testing.assert_close(chosen_RK[real], best_RK[real], rtol=2e-2, atol=2e-3)
    assert (ids_RK[case.num_real :] == -1).all()
    assert (weights_RK[case.num_real :] == 0).all()


def run_counts(ids_TK: torch.Tensor, num_experts: int) -> None:
    """The histogram of ids, of which some are padding."""
    counts_E = expert_token_counts(ids_TK.cuda(), num_experts).cpu()
    assert torch.equal(counts_E, counts_reference.expert_token_counts(ids_TK, num_experts))


def run_device_functions() -> None:
    """What the extension says of devices and of the sizes it takes."""
    library = native.cuda_extension(torch.device("cuda", 0))
    assert library is not None
    assert library.device_count() == torch.cuda.device_count()
    assert library.device_properties(0)["name"] == torch.cuda.get_device_name(0)
    if torch.cuda.device_count() > 1:
        assert library.device_link(0, 1)["performance_rank"] >= 0
    assert library.streaming_linear_fits(in_features=256, out_features=8)
    assert not library.streaming_linear_fits(in_features=264, out_features=8)


NamedRun = tuple[str, Callable[[], None]]


def all_cases() -> dict[str, list[NamedRun]]:
    """Name and call of every case, by kernel."""
    cases: dict[str, list[NamedRun]] = {"device": [("functions", run_device_functions)]}
    for tile in TILES:
        cases[f"grouped, tile {tile}"] = [
            (case.name, partial(run_grouped, case, tile)) for case in grouped_cases(tile)
        ]
    cases["grouped, sorting"] = [
        (f"tile {tile}, {case.name}", partial(run_grouped, case, tile, sorts=True))
        for tile in (16, 32, 64)
        for case in sorting_cases()
    ]
    cases["streaming experts"] = [
        (case.name, partial(run_streaming, case)) for case in STREAMING_CASES
    ]
    cases["streaming linear"] = [
        (f"{rows} rows, {width} to {out}", partial(run_linear, rows, width, out))
        for rows, width, out in [*((rows, 512, 40) for rows in range(1, 17)), *LINEAR_CASES]
    ]
    cases["split linear"] = [
        (f"{rows} rows, {width} to {out}", partial(run_split_linear, rows, width, out))
        for rows, width, out in [*((rows, 512, 40) for rows in (7, 8, 9)), *SPLIT_LINEAR_CASES]
    ]
    cases["norm and router"] = [
        (str(case), partial(run_norm_router, case)) for case in ROUTER_CASES
    ]
    for kernel, launches, decodes in (
        ("warp decode", CLUSTERS, CLUSTER_CASES),
        ("block decode", BLOCKS, BLOCK_CASES),
    ):
        cases[kernel] = [
            (
                f"{launch} for {len(contexts)} contexts {contexts[:9]}, "
                f"{heads} heads to {kv_heads}, {parts} parts",
                partial(run_decode, launch, contexts, heads, kv_heads, block_size, parts),
            )
            for launch in launches
            for contexts, heads, kv_heads, block_size, parts in decodes
        ]
    cases["prefill attention"] = [(str(case), partial(run_prefill, case)) for case in PREFILL_CASES]
    for way, tokens in (("packets", (1, 7, 64)), ("rows", (65, 100))):
        cases[f"exchange by {way}"] = [
            (f"{step_tokens} tokens of {hidden}", partial(run_exchange, step_tokens, hidden, fp8))
            for step_tokens in tokens
            for hidden, fp8 in EXCHANGE_CASES
        ]
    cases["expert counts"] = [
        (
            f"{ids_TK.dtype} {list(ids_TK.shape)}, {num_experts} experts",
            partial(run_counts, ids_TK, num_experts),
        )
        for shape, num_experts in [((0, 8), 4), ((1, 1), 1), ((33, 3), 5), ((9, 2), 5000)]
        for dtype in (torch.int32, torch.int64)
        for ids_TK in [torch.randint(-2, num_experts, shape, dtype=dtype)]
    ]
    return cases
