"""Layers of random experts, and tokens routed to them.

Shape legend: T tokens, H hidden size, E experts, K experts per token, I intermediate size,
J = 2 × I.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu_timing import seconds_per_call
from moe_engine.ops.reference import moe as reference

DEVICE = "cuda"
# An output may be off by this share of its norm: intermediate results are bfloat16.
TOLERANCE = 1.5e-2
# Rows that are compared with the float32 reference.
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Dims:
    """Sizes of one MoE layer."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights in bfloat16."""
        return 3 * self.hidden * self.intermediate * 2


@dataclass(frozen=True)
class Layer:
    """One layer's experts, bfloat16."""

    gate_up_EJH: torch.Tensor
    down_EHI: torch.Tensor

    @classmethod
    def random(cls, dims: Dims) -> Layer:
        """Weights that keep the size of what goes through them."""
        gate_up = torch.empty(
            dims.num_experts,
            2 * dims.intermediate,
            dims.hidden,
            dtype=torch.bfloat16,
            device=DEVICE,
        )
        down = torch.empty(
            dims.num_experts, dims.hidden, dims.intermediate, dtype=torch.bfloat16, device=DEVICE
        )
        return cls(
            gate_up.normal_(std=dims.hidden**-0.5), down.normal_(std=dims.intermediate**-0.5)
        )


@dataclass(frozen=True)
class Batch:
    """Tokens for one call of one layer."""

    layer: Layer
    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor

    @classmethod
    def random(cls, dims: Dims, layer: Layer, num_tokens: int, zipf: bool) -> Batch:
        """Distinct experts per token, drawn evenly or with odds 1, 1/2, 1/3, ..."""
        shape = (num_tokens, dims.num_experts)
        keys_TE = -torch.empty(shape, device=DEVICE).exponential_().log()
        if zipf:
            keys_TE -= torch.arange(1, dims.num_experts + 1, device=DEVICE).log()
            keys_TE = keys_TE[:, torch.randperm(dims.num_experts, device=DEVICE)]
        ids_TK = keys_TE.topk(dims.top_k, dim=1).indices.to(torch.int32)
        weights_TK = torch.rand(num_tokens, dims.top_k, device=DEVICE)
        return cls(
            layer,
            torch.randn(num_tokens, dims.hidden, device=DEVICE, dtype=torch.bfloat16),
            ids_TK,
            weights_TK / weights_TK.sum(dim=1, keepdim=True),
        )

    @property
    def arguments(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """As `ops.moe.expert_ffn` and its implementations take them; all choices are there."""
        gate_up_EJH, down_EHI = self.layer.gate_up_EJH, self.layer.down_EHI
        num_pairs = self.ids_TK.numel()
        return self.x_TH, self.ids_TK, self.weights_TK, gate_up_EJH, down_EHI, num_pairs

    def num_experts_hit(self) -> int:
        """Experts with at least one token; waits for the device."""
        return len(self.ids_TK.unique())

    def check(self, name: str, out_TH: torch.Tensor) -> None:
        """`SystemExit` if some rows of ``out_TH`` are not what float32 gives."""
        rows = torch.randperm(len(out_TH), device=DEVICE)[:CHECKED_ROWS]
        expected = reference.expert_ffn(
            self.x_TH[rows].float(),
            self.ids_TK[rows],
            self.weights_TK[rows],
            self.layer.gate_up_EJH.float(),
            self.layer.down_EHI.float(),
        )
        check_rows(f"{name} at {len(out_TH)} tokens", out_TH[rows], expected)


def check_rows(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """`SystemExit` if a row is off by more than `TOLERANCE` of the norm of what float32 gives."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    errors = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    worst = float(errors.nan_to_num(nan=float("inf")).max())
    if worst > TOLERANCE:
        raise SystemExit(
            f"{name} is wrong: a row is off by {worst:.3g} of its norm, more than {TOLERANCE}; "
            "nothing was timed"
        )


def check_routing(
    name: str, logits_TE: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> None:
    """`SystemExit` if these are not the most likely experts, each once, with weights that sum to 1.

    Experts that are all but equally likely may stand for one another.

    Args:
        logits_TE: of the router, in float32 or wider.
    """
    top_k = ids_TK.shape[1]
    probabilities_TE = logits_TE.softmax(dim=1)
    best_TK = probabilities_TE.topk(top_k, dim=1).values
    chosen_TK = probabilities_TE.gather(1, ids_TK.long().clamp(min=0))
    is_right = (
        bool((ids_TK >= 0).all())
        and bool((ids_TK.sort(dim=1).values.diff(dim=1) > 0).all())
        and torch.allclose(chosen_TK, best_TK, rtol=2e-2, atol=1e-4)
        and torch.allclose(
            weights_TK.to(best_TK.dtype),
            best_TK / best_TK.sum(dim=1, keepdim=True),
            rtol=2e-2,
            atol=2e-3,
        )
    )
    if not is_right:
        raise SystemExit(f"{name} is wrong at {len(ids_TK)} tokens; nothing was timed")


def make_batches(
    dims: Dims, layers: list[Layer], num_tokens: int, num_batches: int, zipf: bool
) -> list[Batch]:
    """Batches that go round the layers."""
    return [
        Batch.random(dims, layers[i % len(layers)], num_tokens, zipf) for i in range(num_batches)
    ]


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """What one of ``calls`` takes, in a graph of all of them."""
    return seconds_per_call(calls) * 1e6
