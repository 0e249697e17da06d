"""The experts' feed-forward: Triton's grouped products against the reference in float32.

Legend: R rows, K experts per row, E experts, H hidden size, I intermediate size, P = R * K pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from moe_engine.ops import moe
from moe_engine.ops.reference import moe as reference
from tests.kernels.triton_device import DEVICE, MATMUL_DTYPES, needs_gpu, needs_triton

# Of the norm of a row: h and the output of each pair are rounded once to the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
# (R, K, E, H, I): one, sizes that fit no tile, one expert, more experts than pairs.
SHAPES = [(1, 1, 1, 16, 16), (5, 2, 4, 64, 32), (37, 3, 5, 100, 50), (3, 4, 20, 48, 80)]


@dataclass(frozen=True)
class Case:
    """Arguments of `expert_ffn`."""

    x_RH: torch.Tensor
    slot_ids_RK: torch.Tensor
    weights_RK: torch.Tensor
    gate_up_EJH: torch.Tensor
    down_EHI: torch.Tensor

    @classmethod
    def random(
        cls,
        num_rows: int,
        top_k: int,
        num_experts: int,
        hidden: int,
        intermediate: int,
        dtype: torch.dtype,
    ) -> Case:
        def randn(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5).to(dtype)

        return cls(
            torch.randn(num_rows, hidden, device=DEVICE).to(dtype),
            torch.randint(-1, num_experts, (num_rows, top_k), dtype=torch.int32, device=DEVICE),
            torch.rand(num_rows, top_k, device=DEVICE),
            randn(num_experts, 2 * intermediate, hidden),
            randn(num_experts, hidden, intermediate),
        )

    def with_ids(self, slot_ids_RK: torch.Tensor) -> Case:
        ids_RK = slot_ids_RK.to(torch.int32).to(DEVICE).contiguous()
        return Case(self.x_RH, ids_RK, self.weights_RK, self.gate_up_EJH, self.down_EHI)

    def rows(self, rows: slice) -> Case:
        return Case(
            self.x_RH[rows],
            self.slot_ids_RK[rows],
            self.weights_RK[rows],
            self.gate_up_EJH,
            self.down_EHI,
        )

    def triton(self, config: object = None) -> torch.Tensor:
        """With a configuration of `kernels.expert_ffn`, or with the one for this batch."""
        from moe_engine.kernels import combine, expert_ffn, expert_grouping

        num_experts, top_k = len(self.gate_up_EJH), self.slot_ids_RK.shape[1]
        offsets_E1, pairs_P = expert_grouping.group_by_expert(
            self.slot_ids_RK.contiguous().view(-1), num_experts
        )
        if config is None:
            config = expert_ffn.config_for(len(pairs_P), num_experts, self.x_RH.dtype)
        assert isinstance(config, expert_ffn.FfnConfig)
        h_PI = expert_ffn.gate_up(
            self.x_RH, self.gate_up_EJH, offsets_E1, pairs_P, top_k, config.gate_up
        )
        y_PH = expert_ffn.down(h_PI, self.down_EHI, offsets_E1, pairs_P, config.down)
        return combine.sum_choices(y_PH, self.slot_ids_RK, self.weights_RK)

    def expected(self) -> torch.Tensor:
        """In float32, expert by expert, so that all weights need not be held twice."""
        out_RH = torch.zeros(self.x_RH.shape, device=self.x_RH.device)
        for expert in self.slot_ids_RK.unique().tolist():
            if expert < 0:
                continue
            out_RH += reference.expert_ffn(
                self.x_RH.float(),
                torch.where(self.slot_ids_RK == expert, 0, -1),
                self.weights_RK,
                self.gate_up_EJH[expert : expert + 1].float(),
                self.down_EHI[expert : expert + 1].float(),
            )
        return out_RH


def check(out_RH: torch.Tensor, case: Case) -> None:
    assert out_RH.dtype == case.x_RH.dtype
    assert out_RH.shape == case.x_RH.shape
    expected_RH = case.expected()
    errors_R = (out_RH.float() - expected_RH).norm(dim=1)
    limits_R = TOLERANCE[case.x_RH.dtype] * expected_RH.norm(dim=1)
    # Not "not above": NaN must fail.
    assert (errors_R <= limits_R).all(), (errors_R / expected_RH.norm(dim=1)).max()


def all_configs() -> list[object]:
    from moe_engine.kernels import expert_ffn

    return [*(config for _, config in expert_ffn.CONFIGS), expert_ffn.LARGE_CONFIG]


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", MATMUL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_matches_the_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    case = Case.random(*shape, dtype)
    check(case.triton(), case)


@needs_triton
def test_stages_fit_where_there_is_less_shared_memory() -> None:
    from moe_engine.kernels import expert_ffn

    # What a program may have, and whether it needs a buffer for its last stage.
    h100, a100, l40s = (232_448, True), (166_912, False), (101_376, False)
    for config in all_configs():
        assert isinstance(config, expert_ffn.FfnConfig)
        for product, num_weights in ((config.gate_up, 2), (config.down, 1)):
            for gpu in (h100, a100):
                assert expert_ffn.fitting_stages(product, num_weights, *gpu) == product.num_stages
    # Compiled for an L40S, 4 stages of it take 147456 bytes and 3 take 98304.
    assert expert_ffn.fitting_stages(expert_ffn.LARGE_CONFIG.gate_up, 2, *l40s) == 3
    assert expert_ffn.fitting_stages(expert_ffn.LARGE_CONFIG.down, 1, *l40s) == 3
    assert expert_ffn.fitting_stages(expert_ffn.LARGE_CONFIG.down, 1, 101_376, True) == 2
    assert expert_ffn.fitting_stages(expert_ffn.LARGE_CONFIG.down, 1, 1024, True) == 1


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", range(4))
def test_every_configuration_matches_the_reference(config: int) -> None:
    case = Case.random(25, 2, 3, 160, 70, torch.float16)
    check(case.triton(all_configs()[config]), case)


@needs_triton
def test_the_largest_batches_take_the_last_configuration() -> None:
    from moe_engine.kernels import expert_ffn

    limits = [limit for limit, _ in expert_ffn.CONFIGS]
    assert limits == sorted(limits)
    assert len(all_configs()) == 4
    assert expert_ffn.config_for(65_536, 128, torch.bfloat16) is expert_ffn.LARGE_CONFIG
    assert expert_ffn.config_for(8, 128, torch.bfloat16) is expert_ffn.CONFIGS[0][1]


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("expert", [0, 3])
def test_one_expert_may_get_every_row(expert: int) -> None:
    case = Case.random(45, 2, 4, 64, 32, torch.float16)
    case = case.with_ids(torch.full((45, 2), expert))
    check(case.triton(), case)


@needs_triton
@pytest.mark.usefixtures("poisoned")
def test_rows_without_an_expert_get_zero() -> None:
    case = Case.random(9, 2, 4, 64, 32, torch.float16)
    ids_RK = case.slot_ids_RK.clone()
    ids_RK[2:5] = -1
    assert (case.with_ids(ids_RK).triton()[2:5] == 0).all()
    assert (case.with_ids(torch.full((9, 2), -1)).triton() == 0).all()


@needs_triton
def test_no_more_tiles_than_programs_however_the_pairs_fall() -> None:
    from moe_engine.kernels import expert_ffn

    generator = torch.Generator().manual_seed(0)
    config = expert_ffn.GemmConfig(16, 64, 32, 4, 2)
    for num_pairs, num_experts in ((1, 1), (15, 40), (16, 3), (17, 3), (500, 7), (64, 512)):
        for skew in (0.0, 1.0, 8.0):
            odds = torch.rand(num_experts, generator=generator) ** skew
            ids = torch.multinomial(odds, num_pairs, replacement=True, generator=generator)
            counts = torch.bincount(ids, minlength=num_experts)
            num_tiles = int(((counts + 15) // 16).sum()) * 2
            assert num_tiles <= expert_ffn._grid(num_pairs, num_experts, 100, config)[0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_operator_matches_the_reference(dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x_RH = torch.randn(6, 32, device=device)
    ids_RK = torch.randint(-1, 4, (6, 3), dtype=dtype, device=device)
    weights_RK = torch.rand(6, 3, device=device)
    gate_up_EJH = torch.randn(4, 48, 32, device=device) / 6
    down_EHI = torch.randn(4, 32, 24, device=device) / 5
    weights = (gate_up_EJH, down_EHI)
    out_RH = moe.summed(moe.expert_ffn(x_RH, ids_RK, weights_RK, *weights))
    expected_RH = reference.expert_ffn(x_RH, ids_RK, weights_RK, *weights)
    torch.testing.assert_close(out_RH, expected_RH, rtol=1e-4, atol=1e-5)


def test_no_rows_give_no_rows() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    none = (
        torch.empty(0, 32, device=device),
        torch.empty(0, 2, dtype=torch.int32, device=device),
        torch.empty(0, 2, device=device),
    )
    weights = torch.randn(4, 48, 32, device=device), torch.randn(4, 32, 24, device=device)
    assert moe.summed(moe.expert_ffn(*none, *weights)).shape == (0, 32)


REAL_ROWS = [1, 2, 7, 8, 32, 64, 128, 256, 500, 1024]


@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_rows", REAL_ROWS)
@pytest.mark.parametrize(("hidden", "intermediate"), [(2048, 768), (4096, 1536)])
def test_real_sizes(hidden: int, intermediate: int, num_rows: int) -> None:
    case = Case.random(num_rows, 8, 128, hidden, intermediate, torch.bfloat16)
    check(case.triton(), case)
    check(moe.summed(moe.expert_ffn(*vars(case).values())), case)


@needs_gpu
@pytest.mark.usefixtures("poisoned")
def test_a_prefill_of_8192_rows() -> None:
    case = Case.random(8192, 8, 128, 2048, 768, torch.bfloat16)
    out_RH = case.triton()
    some = slice(8000, 8192)
    check(out_RH[some], case.rows(some))


@needs_gpu
@pytest.mark.parametrize("config", range(4))
def test_a_row_gets_the_same_bits_in_any_batch(config: int) -> None:
    case = Case.random(300, 8, 16, 2048, 768, torch.bfloat16)
    chosen = all_configs()[config]
    together_RH = case.triton(chosen)
    for rows in (slice(0, 1), slice(299, 300), slice(17, 40), slice(100, 300)):
        assert torch.equal(case.rows(rows).triton(chosen), together_RH[rows])


@needs_gpu
@pytest.mark.parametrize("num_rows", [1, 64, 700])
def test_a_graph_replays_with_other_routing(num_rows: int) -> None:
    case = Case.random(num_rows, 8, 128, 512, 256, torch.bfloat16)
    moe.summed(moe.expert_ffn(*vars(case).values()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_RH = moe.summed(moe.expert_ffn(*vars(case).values()))
    for low, high in ((0, 128), (-100, 128), (3, 4), (-1, 0)):
        case.slot_ids_RK.copy_(torch.randint(low, high, (num_rows, 8)))
        case.x_RH.copy_(torch.randn(num_rows, 512))
        graph.replay()
        check(out_RH, case)


@needs_gpu
def test_weight_offsets_pass_two_to_the_31() -> None:
    num_experts, hidden, intermediate = 512, 2048, 1536
    gate_up_EJH = torch.empty(
        num_experts, 2 * intermediate, hidden, dtype=torch.bfloat16, device=DEVICE
    ).normal_(std=hidden**-0.5)
    down_EHI = torch.empty(
        num_experts, hidden, intermediate, dtype=torch.bfloat16, device=DEVICE
    ).normal_(std=intermediate**-0.5)
    assert gate_up_EJH[511].data_ptr() - gate_up_EJH.data_ptr() > 2**32
    x_RH = torch.randn(5, hidden, device=DEVICE, dtype=torch.bfloat16)
    ids_RK = torch.tensor([[511], [0], [300], [510], [511]], dtype=torch.int32, device=DEVICE)
    case = Case(x_RH, ids_RK, torch.rand(5, 1, device=DEVICE), gate_up_EJH, down_EHI)
    check(case.triton(), case)


@needs_gpu
def test_output_offsets_pass_two_to_the_31() -> None:
    num_rows = 140_000
    case = Case.random(num_rows, 8, 4, 2048, 16, torch.bfloat16)
    assert num_rows * 8 * 2048 > 2**31
    last = slice(num_rows - 100, num_rows)
    check(case.triton()[last], case.rows(last))
