"""The norm and the router of many rows in one launch, against the two operators and float64.

Legend: T tokens, E experts, H hidden size, K experts per token.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch

from moe_engine.ops import moe, norm
from moe_engine.ops.linear import MANY_ROWS, AddedOutput
from moe_engine.ops.reference import norm as reference
from tests.kernels.test_norm import TOLERANCE
from tests.kernels.triton_device import DEVICE, INTERPRETED, needs_gpu, needs_triton

EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float32]
# (T, H, E, K): nothing, one, the widest choice, one expert, sizes that fit no tile, every tile.
SHAPES = [
    (0, 64, 8, 2),
    (1, 64, 8, 8),
    (17, 100, 100, 5),
    (16, 64, 512, 32),
    (33, 3, 1, 1),
    (70, 300, 60, 4),
]
# Of a logit: a rounding in float32 per thousand or so additions, and of each product it adds up
# one in the dtype, in the interpreter a cut.
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.04 if INTERPRETED else 0.02}


@dataclass
class Inputs:
    """x_TH None: the residual is the sum."""

    x_TH: torch.Tensor | None
    residual_TH: torch.Tensor
    weight_H: torch.Tensor
    gate_EH: torch.Tensor

    @classmethod
    def random(
        cls, shape: tuple[int, int, int], dtype: torch.dtype, *, has_x: bool = True
    ) -> Inputs:
        num_rows, hidden, num_experts = shape
        x_TH = (3 * torch.randn(num_rows, hidden, device=DEVICE)).to(dtype)
        residual_TH = torch.randn(num_rows, hidden, device=DEVICE).to(dtype)
        weight_H = (1 + 0.3 * torch.randn(hidden, device=DEVICE)).to(dtype)
        gate_EH = (torch.randn(num_experts, hidden, device=DEVICE) / hidden**0.5).to(dtype)
        return cls(x_TH if has_x else None, residual_TH, weight_H, gate_EH)

    def run(
        self, top_k: int, normalize: bool = True, num_tokens: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        from moe_engine.kernels import norm_router

        num_tokens_1 = None
        if num_tokens is not None:
            num_tokens_1 = torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
        arguments = (self.weight_H, EPS, self.gate_EH, top_k, normalize, num_tokens_1)
        return norm_router.norm_router(self.x_TH, self.residual_TH, *arguments)

    def check(
        self, found: tuple[torch.Tensor, ...], normalize: bool, num_tokens: int | None = None
    ) -> None:
        """The residual as the norm's kernel makes it; experts by the logits of what is stored."""
        from moe_engine.kernels import rms_norm

        normed_TH, stream_TH, ids_TK, weights_TK = found
        dtype = self.residual_TH.dtype
        assert normed_TH.dtype == stream_TH.dtype == dtype
        assert (ids_TK.dtype, weights_TK.dtype) == (torch.int32, torch.float32)
        if self.x_TH is None:
            assert stream_TH is self.residual_TH
            expected_TH = rms_norm.rms_norm(self.residual_TH, self.weight_H, EPS)
        else:
            expected_TH, expected_stream_TH = rms_norm.add_rms_norm(
                self.x_TH, self.residual_TH, self.weight_H, EPS
            )
            assert torch.equal(stream_TH, expected_stream_TH)
        # The squares are added up in another order, which moves a few roundings of the product.
        close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close(normed_TH, expected_TH, **close)
        if dtype == torch.bfloat16:
            assert (normed_TH == expected_TH).double().mean() > 0.99 or normed_TH.numel() < 1000
        num_tokens = len(ids_TK) if num_tokens is None else num_tokens
        self._check_experts(stream_TH, ids_TK[:num_tokens], weights_TK[:num_tokens], normalize)
        assert (ids_TK[num_tokens:] == -1).all()
        assert (weights_TK[num_tokens:] == 0).all()

    def _check_experts(
        self,
        stream_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        normalize: bool,
    ) -> None:
        tolerance = LOGIT_TOLERANCE[self.residual_TH.dtype]
        top_k = ids_TK.shape[1]
        exact_TH = reference.rms_norm(stream_TH.float(), self.weight_H.float(), EPS)
        logits_TE = exact_TH[: len(ids_TK)].double() @ self.gate_EH.double().t()
        ids_TK = ids_TK.long()
        assert ((ids_TK >= 0) & (ids_TK < len(self.gate_EH))).all()
        assert all(len(set(row)) == top_k for row in ids_TK.tolist())
        chosen_TK = logits_TE.gather(1, ids_TK)
        best_TK = logits_TE.topk(top_k, dim=1).values
        torch.testing.assert_close(chosen_TK, best_TK, rtol=0, atol=tolerance)
        expected_TK = logits_TE.softmax(dim=1).gather(1, ids_TK)
        if normalize:
            expected_TK = expected_TK / expected_TK.sum(dim=1, keepdim=True)
        torch.testing.assert_close(
            weights_TK.double(), expected_TK, rtol=max(1e-3, 2 * tolerance), atol=1e-6
        )


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_x", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_residual_and_experts(
    shape: tuple[int, int, int, int], normalize: bool, has_x: bool, dtype: torch.dtype
) -> None:
    inputs = Inputs.random(shape[:3], dtype, has_x=has_x)
    inputs.check(inputs.run(shape[3], normalize), normalize)


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("num_rows", [63, 64, 65])
def test_every_tile_takes_rows_that_fill_it_or_not(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, number: int
) -> None:
    from moe_engine.kernels import norm_router

    monkeypatch.setattr(norm_router, "LAUNCHES", ((1 << 62, *norm_router.LAUNCHES[number][1:]),))
    inputs = Inputs.random((num_rows, 200, 128), torch.bfloat16)
    inputs.check(inputs.run(8), True)


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 19, 37])
def test_padding_rows_get_no_expert_whatever_they_hold(num_tokens: int) -> None:
    inputs = Inputs.random((37, 64, 20), torch.float32)
    inputs.check(inputs.run(3, num_tokens=num_tokens), True, num_tokens)
    inputs.residual_TH[num_tokens:] = float("nan")
    normed_TH, _, ids_TK, weights_TK = inputs.run(3, num_tokens=num_tokens)
    assert normed_TH[:num_tokens].isfinite().all()
    assert weights_TK.isfinite().all()
    assert (ids_TK[num_tokens:] == -1).all()


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("has_x", [True, False])
def test_all_tokens_may_choose_the_same_experts(has_x: bool) -> None:
    """Equal logits go to the lower id, in every row; whole numbers add up exactly in any order."""
    inputs = Inputs.random((40, 64, 16), torch.float32, has_x=has_x)
    for tensor in (inputs.x_TH, inputs.residual_TH, inputs.weight_H, inputs.gate_EH):
        if tensor is not None:
            tensor.round_()
    inputs.gate_EH[:] = torch.randint(-3, 4, (64,), device=DEVICE)
    _, _, ids_TK, weights_TK = inputs.run(4)
    assert (ids_TK == torch.arange(4, device=DEVICE)).all()
    torch.testing.assert_close(weights_TK, torch.full_like(weights_TK, 0.25))


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_nan_stays_in_its_row() -> None:
    inputs = Inputs.random((20, 64, 10), torch.float32)
    expected = inputs.run(3)
    assert inputs.x_TH is not None
    inputs.x_TH[3, 5] = float("nan")
    found = inputs.run(3)
    assert found[0][3].isnan().all()
    others = torch.arange(20, device=DEVICE) != 3
    assert all(torch.equal(a[others], b[others]) for a, b in zip(found, expected, strict=True))


@needs_triton
def test_slices_of_wider_rows_are_read_in_place() -> None:
    wide = Inputs.random((19, 128, 12), torch.float32)
    assert wide.x_TH is not None
    inputs = Inputs(
        wide.x_TH[:, 32:96], wide.residual_TH[:, 64:], wide.weight_H[:64], wide.gate_EH[:, :64]
    )
    inputs.check(inputs.run(4), True)


@needs_triton
def test_a_row_has_the_same_bits_at_any_place() -> None:
    inputs = Inputs.random((50, 96, 24), torch.bfloat16)
    assert inputs.x_TH is not None
    order_T = torch.randperm(50, device=DEVICE)
    found = inputs.run(4)
    moved = Inputs(
        inputs.x_TH[order_T], inputs.residual_TH[order_T], inputs.weight_H, inputs.gate_EH
    ).run(4)
    assert all(torch.equal(a[order_T], b) for a, b in zip(found, moved, strict=True))


@needs_triton
def test_the_launch_fits_its_experts() -> None:
    from moe_engine.kernels import norm_router

    for padded_experts in (16, 128, 256, 512):
        for num_rows in (1, 2048, 2049, 4097, 8192):
            block_t, num_warps, num_stages, step_bytes = norm_router._launch_shape(
                num_rows, padded_experts
            )
            assert 16 <= block_t <= norm_router.MAX_LOGITS // padded_experts
            assert num_warps in (4, 8, 16)
            assert padded_experts * block_t <= num_warps * norm_router.LOGITS_PER_WARP
            stage_bytes = (padded_experts + 2 * block_t) * step_bytes
            assert num_stages >= 2
            assert num_stages * stage_bytes <= norm_router.STAGES_BYTES
    for limit, *shape in norm_router.LAUNCHES:
        assert norm_router._launch_shape(limit, 128)[:3] == tuple(shape), (
            "Qwen3's as they are listed"
        )


@pytest.mark.parametrize(
    ("num_rows", "dtype", "num_experts", "is_taken"),
    [
        (MANY_ROWS, torch.bfloat16, 128, False),
        (MANY_ROWS + 1, torch.bfloat16, 128, True),
        (MANY_ROWS + 1, torch.float32, 512, True),
        (MANY_ROWS + 1, torch.float16, 128, False),
        (MANY_ROWS + 1, torch.bfloat16, 513, False),
    ],
)
@needs_triton
def test_the_operator_takes_it_for_many_rows(
    monkeypatch: pytest.MonkeyPatch,
    num_rows: int,
    dtype: torch.dtype,
    num_experts: int,
    is_taken: bool,
) -> None:
    """With and without the sum; what it does not take goes to the two operators."""
    from moe_engine.kernels import norm_router

    calls: list[bool] = []

    def counting(x_TH: torch.Tensor | None, *arguments: object) -> tuple[torch.Tensor, ...]:
        calls.append(x_TH is not None)
        return norm_router_of(x_TH, *arguments)

    norm_router_of = norm_router.norm_router
    monkeypatch.setattr(norm_router, "norm_router", counting)
    monkeypatch.setattr(moe, "_runs_triton", lambda x: True)
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
    inputs = Inputs.random((num_rows, 64, num_experts), dtype)
    assert inputs.x_TH is not None
    router = (inputs.weight_H, EPS, inputs.gate_EH, 4, True)
    found = moe.norm_and_route(inputs.x_TH, inputs.residual_TH, *router)
    # The residual stream is that of the added output, not the one beside it.
    added = AddedOutput(inputs.x_TH + inputs.residual_TH)
    found_added = moe.norm_and_route(added, torch.full_like(inputs.x_TH, torch.nan), *router)
    assert found_added[1] is added.stream_TO
    assert calls == [True, False] * is_taken
    expected = norm.add_rms_norm(inputs.x_TH, inputs.residual_TH, inputs.weight_H, EPS)
    tolerance = TOLERANCE[dtype]
    for some in (found, found_added):
        torch.testing.assert_close(some[:2], expected, rtol=tolerance, atol=tolerance)
        probabilities_TE = (some[0].float() @ inputs.gate_EH.float().t()).softmax(dim=1)
        chosen_TK = probabilities_TE.gather(1, some[2].long())
        best_TK = probabilities_TE.topk(4).values
        torch.testing.assert_close(chosen_TK, best_TK, rtol=0.1, atol=1e-3)


@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_x", [True, False])
@pytest.mark.parametrize("num_rows", [1, 513, 2048, 2049, 3001, 4097, 8192])
def test_real_sizes(num_rows: int, has_x: bool, dtype: torch.dtype) -> None:
    inputs = Inputs.random((num_rows, 2048, 128), dtype, has_x=has_x)
    inputs.check(inputs.run(8, num_tokens=num_rows - 1), True, num_rows - 1)


@needs_gpu
@pytest.mark.parametrize("has_x", [True, False])
def test_row_offsets_pass_two_to_the_31(has_x: bool) -> None:
    row_stride = 2**30
    storage = torch.empty(2 * row_stride + 64, dtype=torch.bfloat16, device=DEVICE)
    inputs = Inputs.random((3, 64, 16), torch.bfloat16, has_x=has_x)
    apart_TH = storage.as_strided((3, 64), (row_stride, 1))
    apart_TH.copy_(inputs.residual_TH)
    inputs.residual_TH = apart_TH
    inputs.check(inputs.run(4), True)
