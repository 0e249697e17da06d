"""The operators of a decode step that have a choice of kernels: which, and what follows from times.

Each has a section in the files of `moe_engine.ops.tuning`. To tune a new choice, name its kernel
in `kernels`, force it in `forced`, recognise it in `runs` and set its field in `derive`.

Shape legend: R rows, H hidden size, E experts, K experts per row, J = 2 × intermediate size,
I intermediate size, X input width, O output width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch

from benchmarks.tune_limits import Timed, best_limits, renewed_tiles
from moe_engine.layers.moe import SparseMoE
from moe_engine.models.qwen3_moe import DecoderLayer, Qwen3MoeForCausalLM
from moe_engine.ops import hopper, moe, tuning, warp_decode
from moe_engine.ops.tuning import (
    Choices,
    DecodeChoices,
    ExpertChoices,
    LinearChoices,
    NormRouterChoices,
)


class Operator(ABC):
    """An operator of one shape, as a rank has it.

    Attributes:
        section: its name in the files.
        shape: the sizes that its choices hold for.
    """

    section: ClassVar[str]
    shape: tuple[int, ...]

    def __init__(self, device: torch.device) -> None:
        self._table = tuning.table(device)

    @property
    def kind(self) -> type[Choices]:
        """What its choices are."""
        return tuning.SECTIONS[self.section]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.section} {'x'.join(map(str, self.shape))}"

    @property
    def present(self) -> Choices:
        """What it chooses by today."""
        return self._table.get((self.kind, self.shape), tuning.DEFAULTS[self.kind])

    @contextmanager
    def chosen_by(self, choices: Choices) -> Iterator[None]:
        """Choose by these inside; what is captured there stays."""
        present = self.present
        self._table[self.kind, self.shape] = choices
        try:
            yield
        finally:
            self._table[self.kind, self.shape] = present

    def takes(self, kernel: str, batch: int) -> bool:
        """Whether this kernel would run if it were forced."""
        with self.chosen_by(self.forced(kernel, batch)):
            return self.runs(batch) == kernel

    @abstractmethod
    def kernels(self, batch: int) -> list[str]:
        """The kernels worth trying; the operator need not take all of them."""

    @abstractmethod
    def forced(self, kernel: str, batch: int) -> Choices:
        """Choices by which this kernel runs, if it takes the batch at all."""

    @abstractmethod
    def runs(self, batch: int) -> str:
        """The kernel that runs as it chooses now."""

    @abstractmethod
    def derive(self, timed: Sequence[Timed]) -> Choices:
        """Today's choices, but for those that were measured to be slower than others."""


class Experts(Operator):
    """The experts' feed-forward."""

    section = "experts"

    def __init__(self, gate_up_EJH: torch.Tensor, down_EHI: torch.Tensor, top_k: int) -> None:
        super().__init__(down_EHI.device)
        self._weights = gate_up_EJH, down_EHI
        num_experts, hidden, intermediate = down_EHI.shape
        self.shape = (hidden, intermediate, num_experts, top_k)

    def kernels(self, batch: int) -> list[str]:
        """Streaming while few rows share an expert, and tiles that are not mostly empty."""
        mean_pairs = self._mean_pairs(batch)
        tiles = [tile for tile in tuning.TILES if tile <= max(64, 8 * mean_pairs)]
        return ["streaming"] * (mean_pairs <= 0.5) + [_tile_name(tile) for tile in tiles]

    def forced(self, kernel: str, batch: int) -> ExpertChoices:
        """See `Operator`."""
        if kernel == "streaming":
            return ExpertChoices(streaming_max_rows=batch)
        tile = int(kernel.removeprefix("tile "))
        return ExpertChoices(streaming_max_rows=0, tiles=((math.inf, tile),))

    def runs(self, batch: int) -> str:
        """See `Operator`."""
        gate_up_EJH, down_EHI = self._weights
        hidden, _, num_experts, top_k = self.shape
        x_RH = down_EHI.new_empty(batch, hidden)
        ids_RK = torch.empty(batch, top_k, dtype=torch.int32, device=x_RH.device)
        kernel = moe.choose_expert_ffn(x_RH, ids_RK, gate_up_EJH, down_EHI)
        if kernel != "grouped":
            return kernel
        choices = moe.expert_choices(down_EHI, top_k)
        return _tile_name(choices.tokens_per_tile(ids_RK.numel(), num_experts))

    def derive(self, timed: Sequence[Timed]) -> ExpertChoices:
        """See `Operator`; streaming is set against the best tile."""
        present = self.present
        assert isinstance(present, ExpertChoices)
        _, _, num_experts, top_k = self.shape
        steps, tiles = [], []
        for step in sorted(timed, key=lambda step: step.batch):
            today = present.tokens_per_tile(step.batch * top_k, num_experts)
            best = step.best([_tile_name(today), *map(_tile_name, tuning.TILES)])
            step_ms = {"grouped": step.step_ms[best]}
            if "streaming" in step.step_ms:
                step_ms["streaming"] = step.step_ms["streaming"]
            runs = "streaming" if step.present == "streaming" else "grouped"
            steps.append(Timed(step.batch, step.input, runs, step_ms))
            tiles.append((step.batch, int(best.removeprefix("tile ")), today))
        order, limits = ("streaming", "grouped"), [present.streaming_max_rows]
        [streaming], _ = best_limits(steps, order, limits)
        points = [
            (self._mean_pairs(batch), today if batch <= streaming else best)
            for batch, best, today in tiles
        ]
        return ExpertChoices(streaming, renewed_tiles(points, present.tiles))

    def _mean_pairs(self, batch: int) -> float:
        """Average pairs of an expert."""
        return batch * self.shape[3] / self.shape[2]


class Linear(Operator):
    """A linear layer whose sum may be left to the operator that follows."""

    section = "linear"
    ORDER = ("streaming", "split", "library")

    def __init__(self, weight_OX: torch.Tensor) -> None:
        super().__init__(weight_OX.device)
        self._weight = weight_OX
        self.shape = (weight_OX.shape[1], weight_OX.shape[0])

    def kernels(self, batch: int) -> list[str]:
        """All of them."""
        return list(self.ORDER)

    def forced(self, kernel: str, batch: int) -> LinearChoices:
        """See `Operator`."""
        if kernel == "streaming":
            return LinearChoices(streaming_max_rows=batch)
        return LinearChoices(0, split_max_rows=batch if kernel == "split" else 0)

    def runs(self, batch: int) -> str:
        """See `Operator`."""
        x_RX = self._weight.new_empty(batch, self.shape[0])
        if hopper.takes_split_linear(x_RX, self._weight):
            return "split"
        return "streaming" if hopper.takes_linear(x_RX, self._weight) else "library"

    def derive(self, timed: Sequence[Timed]) -> LinearChoices:
        """See `Operator`."""
        present = self.present
        assert isinstance(present, LinearChoices)
        most = present.streaming_max_rows
        split_rows = [row for row in range(hopper.SPLIT_LINEAR_MAX_ROWS + 1) if self._splits(row)]
        today = [most, max(split_rows, default=most)]
        limits, _ = best_limits(timed, self.ORDER, today)
        return present if limits == today else LinearChoices(*limits)

    def _splits(self, batch: int) -> bool:
        return self.runs(batch) == "split"


class NormRouter(Operator):
    """A norm and the router behind it."""

    section = "norm_router"
    ORDER = ("fused", "separate")
    MAX_ROWS = 64

    def __init__(self, gate_EH: torch.Tensor, top_k: int) -> None:
        super().__init__(gate_EH.device)
        self._gate, self._top_k = gate_EH, top_k
        self.shape = (gate_EH.shape[1], gate_EH.shape[0])

    def kernels(self, batch: int) -> list[str]:
        """One launch only for few rows."""
        return list(self.ORDER if batch <= self.MAX_ROWS else self.ORDER[1:])

    def forced(self, kernel: str, batch: int) -> NormRouterChoices:
        """See `Operator`."""
        return NormRouterChoices(batch if kernel == "fused" else 0)

    def runs(self, batch: int) -> str:
        """See `Operator`."""
        residual_RH = self._gate.new_empty(batch, self.shape[0])
        is_fused = hopper.takes_norm_router(residual_RH, self._gate, self._top_k)
        return "fused" if is_fused else "separate"

    def derive(self, timed: Sequence[Timed]) -> NormRouterChoices:
        """See `Operator`."""
        present = self.present
        assert isinstance(present, NormRouterChoices)
        limits, _ = best_limits(timed, self.ORDER, [present.fused_max_rows])
        return NormRouterChoices(*limits)


class DecodeAttention(Operator):
    """Attention where every row decodes."""

    section = "decode_attention"
    MAX_PAIRS = 32
    SHARES = (1, 4, 8)

    def __init__(self, num_heads: int, k_cache_BLGD: torch.Tensor) -> None:
        super().__init__(k_cache_BLGD.device)
        self._cache = k_cache_BLGD
        self.shape = (num_heads, k_cache_BLGD.shape[2])

    def kernels(self, batch: int) -> list[str]:
        """Warps only for few rows, with today's shares and others."""
        shares = sorted({*self.SHARES, self._choices().warp_max_shares})
        has_few_rows = batch * self.shape[1] <= self.MAX_PAIRS
        return [*(_warps_name(most) for most in shares if has_few_rows), "paged"]

    def forced(self, kernel: str, batch: int) -> DecodeChoices:
        """See `Operator`."""
        if kernel == "paged":
            return DecodeChoices(warp_max_pairs=0)
        return DecodeChoices(batch * self.shape[1], int(kernel.removeprefix("warps, shares ")))

    def runs(self, batch: int) -> str:
        """See `Operator`."""
        num_heads, num_kv_heads = self.shape
        width = (num_heads + 2 * num_kv_heads) * self._cache.shape[3]
        qkv_RX = self._cache.new_empty(batch, width)
        if warp_decode.takes_warp_decode(qkv_RX, qkv_RX.dtype, num_heads, self._cache):
            return _warps_name(self._choices().warp_max_shares)
        return "paged"

    def derive(self, timed: Sequence[Timed]) -> DecodeChoices:
        """See `Operator`; all steps take the same shares, so those that are best in all."""
        present, num_kv_heads = self._choices(), self.shape[1]
        today = present.warp_max_pairs // num_kv_heads
        others = sorted({*self.SHARES} - {present.warp_max_shares})
        found = []
        for shares in (present.warp_max_shares, *others):
            limits, cost = best_limits(timed, (_warps_name(shares), "paged"), [today])
            found.append((cost, shares, limits[0]))
        _, shares, most = min(found, key=lambda candidate: candidate[0])
        pairs = present.warp_max_pairs if most == today else most * num_kv_heads
        return DecodeChoices(pairs, shares)

    def _choices(self) -> DecodeChoices:
        present = self.present
        assert isinstance(present, DecodeChoices)
        return present


def operators_of(
    model: Qwen3MoeForCausalLM, k_cache_BLGD: torch.Tensor, top_k: int
) -> list[Operator]:
    """Those of the model's first layer with experts, each shape once."""
    attention, experts = next(
        (layer.self_attn, layer.mlp)
        for layer in model.layers
        if isinstance(layer, DecoderLayer) and isinstance(layer.mlp, SparseMoE)
    )
    qkv_OX = attention.qkv_proj.weight
    num_heads = qkv_OX.shape[0] // k_cache_BLGD.shape[3] - 2 * k_cache_BLGD.shape[2]
    operators = [
        Experts(experts.gate_up, experts.down, top_k),
        Linear(qkv_OX),
        Linear(attention.o_proj.weight),
        NormRouter(experts.router, top_k),
        DecodeAttention(num_heads, k_cache_BLGD),
    ]
    return list({(op.section, op.shape): op for op in operators}.values())


def _tile_name(tile: int) -> str:
    return f"tile {tile}"


def _warps_name(shares: int) -> str:
    return f"warps, shares {shares}"
