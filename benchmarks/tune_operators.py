"""The operators of a decode step that have a choice of kernels: which, and what follows from times.

Each has a section in the files of `moe_engine.ops.tuning`. To tune a new kernel, name it in
`kernels`, force it in `forced` and recognise it in `runs`.

Shape legend: R rows, H hidden size, E experts, K experts per row, J = 2 × intermediate size,
I intermediate size, X input width, O output width, B blocks, L tokens a block, G KV heads,
D head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import ClassVar

import torch

from benchmarks.forced_choices import forced_choices
from benchmarks.options import launch_name, parse_launch
from benchmarks.tune_limits import Timed, best_kernel, by_batch, renewed
from moe_engine.layers.moe import SparseMoE
from moe_engine.models.qwen3_moe import DecoderLayer, Qwen3MoeForCausalLM
from moe_engine.ops import decode_attention, hopper, moe, tuning
from moe_engine.ops.tuning import (
    INF,
    Choices,
    DecodeChoices,
    ExpertChoices,
    Launch,
    LinearChoices,
    NormRouterChoices,
    pick,
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
        self._device = device

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
        """What it chooses by now."""
        return tuning.choices(self.kind, self._device, *self.shape)

    def with_kernel(self, kernel: str) -> AbstractContextManager[None]:
        """A context in which it takes this kernel wherever that can run."""
        return forced_choices(self._device, self.shape, self.forced(kernel))

    def takes(self, kernel: str, batch: int) -> bool:
        """Whether this kernel can run."""
        with self.with_kernel(kernel):
            return self.runs(batch) == kernel

    @abstractmethod
    def kernels(self, batch: int) -> list[str]:
        """The kernels worth trying; the operator need not take all of them."""

    @abstractmethod
    def forced(self, kernel: str) -> Choices:
        """Choices by which this kernel runs if it can."""

    @abstractmethod
    def runs(self, batch: int) -> str:
        """The kernel that runs as it chooses now."""

    @abstractmethod
    def derive(self, timed: Sequence[Timed]) -> Choices:
        """Today's choices, but for those that were measured to be slower than others."""


def best_points(timed: Sequence[Timed]) -> list[tuple[int, str]]:
    """The best kernel of each batch size, among all that were timed."""
    return [
        (batch, best_kernel(steps, [steps[0].present, *steps[0].step_ms]))
        for batch, steps in by_batch(timed).items()
    ]


class Experts(Operator):
    """The experts' feed-forward."""

    section = "experts"

    def __init__(self, gate_up_EJH: torch.Tensor, down_EHI: torch.Tensor, top_k: int) -> None:
        super().__init__(down_EHI.device)
        self._weights = gate_up_EJH, down_EHI
        num_experts, hidden, intermediate = down_EHI.shape
        self.shape = (hidden, intermediate, num_experts, top_k)

    def kernels(self, batch: int) -> list[str]:
        """See `Operator`.

        Streaming while few rows share an expert, Triton's while the memory takes the time, and
        tiles that are not mostly empty.
        """
        mean_pairs = self._mean_pairs(batch)
        tiles = [t for t in ExpertChoices.VALUES["tiles"] if t <= max(64, 8 * mean_pairs)]
        return [
            *["streaming"] * (mean_pairs <= 0.5),
            *["triton"] * (mean_pairs <= 8),
            *[_tile_name(tile) for tile in tiles],
        ]

    def forced(self, kernel: str) -> ExpertChoices:
        """See `Operator`."""
        if not _is_tile(kernel):
            return ExpertChoices(kernels=((INF, kernel),))
        tile = int(kernel.removeprefix("tile "))
        return ExpertChoices(((INF, "grouped"),), ((INF, tile),))

    def runs(self, batch: int) -> str:
        """See `Operator`."""
        gate_up_EJH, down_EHI = self._weights
        x_RH = down_EHI.new_empty(batch, self.shape[0])
        ids_RK = torch.empty(batch, self.shape[3], dtype=torch.int32, device=x_RH.device)
        num_pairs = ids_RK.numel()
        kernel = moe.choose_expert_ffn(x_RH, ids_RK, gate_up_EJH, down_EHI, num_pairs)
        if kernel != "grouped":
            return kernel
        return _tile_name(moe.tokens_per_tile(down_EHI, ids_RK.shape[1], num_pairs))

    def derive(self, timed: Sequence[Timed]) -> ExpertChoices:
        """See `Operator`; the tiles also where another kernel is better, but then today's."""
        present = self.present
        assert isinstance(present, ExpertChoices)
        kernels, tiles = [], []
        for batch, best in best_points(timed):
            mean_pairs = self._mean_pairs(batch)
            if _is_tile(best):
                kernel, tile = "grouped", int(best.removeprefix("tile "))
            else:
                kernel, tile = best, pick(present.tiles, mean_pairs)
            kernels.append((batch, kernel))
            tiles.append((mean_pairs, tile))
        return ExpertChoices(renewed(present.kernels, kernels), renewed(present.tiles, tiles))

    def _mean_pairs(self, batch: int) -> float:
        """Average pairs of an expert."""
        return batch * self.shape[3] / self.shape[2]


class Linear(Operator):
    """A linear layer whose sum may be left to the operator that follows."""

    section = "linear"

    def __init__(self, weight_OX: torch.Tensor) -> None:
        super().__init__(weight_OX.device)
        self._weight = weight_OX
        self.shape = (weight_OX.shape[1], weight_OX.shape[0])

    def kernels(self, batch: int) -> list[str]:
        """Kernels for fewer rows, or for many more, are not worth it."""
        first = {"streaming": 1, "split": 5, "library": 9}
        return [kernel for kernel, least in first.items() if batch >= least]

    def forced(self, kernel: str) -> LinearChoices:
        """See `Operator`."""
        return LinearChoices(((INF, kernel),))

    def runs(self, batch: int) -> str:
        """See `Operator`."""
        x_RX = self._weight.new_empty(batch, self.shape[0])
        takes = {
            "split": hopper.takes_split_linear,
            "streaming": hopper.takes_linear,
        }
        return next((name for name, does in takes.items() if does(x_RX, self._weight)), "library")

    def derive(self, timed: Sequence[Timed]) -> LinearChoices:
        """See `Operator`."""
        present = self.present
        assert isinstance(present, LinearChoices)
        return LinearChoices(renewed(present.kernels, best_points(timed)))


class NormRouter(Operator):
    """A norm and the router behind it."""

    section = "norm_router"
    MAX_ROWS = 128

    def __init__(self, gate_EH: torch.Tensor, top_k: int) -> None:
        super().__init__(gate_EH.device)
        self._gate, self._top_k = gate_EH, top_k
        self.shape = (gate_EH.shape[1], gate_EH.shape[0])

    def kernels(self, batch: int) -> list[str]:
        """One launch only for few rows."""
        return ["fused"] * (batch <= self.MAX_ROWS) + ["separate"]

    def forced(self, kernel: str) -> NormRouterChoices:
        """See `Operator`."""
        return NormRouterChoices(((INF, kernel),))

    def runs(self, batch: int) -> str:
        """See `Operator`."""
        x_RH = self._gate.new_empty(batch, self.shape[0])
        weight_H = self._gate.new_empty(self.shape[0])
        is_fused = hopper.takes_norm_router(x_RH, x_RH, weight_H, self._gate, self._top_k)
        return "fused" if is_fused else "separate"

    def derive(self, timed: Sequence[Timed]) -> NormRouterChoices:
        """See `Operator`."""
        present = self.present
        assert isinstance(present, NormRouterChoices)
        return NormRouterChoices(renewed(present.kernels, best_points(timed)))


class DecodeAttention(Operator):
    """Attention where every row decodes.

    Args:
        more: launches to try beside those like today's.
    """

    section = "decode_attention"
    CLUSTERS = (Launch(0, 4, 2048), Launch(0, 8, 2048))
    CLUSTERS_MAX_PAIRS = 32

    def __init__(
        self, num_heads: int, k_cache_BLGD: torch.Tensor, more: Sequence[Launch] = ()
    ) -> None:
        super().__init__(k_cache_BLGD.device)
        self._cache = k_cache_BLGD
        self._more = more
        self.shape = (num_heads, k_cache_BLGD.shape[2])

    def kernels(self, batch: int) -> list[str]:
        """Those of today around the batch, blocks of the other size, clusters for few rows."""
        num_pairs = batch * self.shape[1]
        steps = self._choices().launches
        here = next(number for number, (most, _) in enumerate(steps) if num_pairs <= most)
        launches = [launch for _, launch in steps[max(0, here - 1) : here + 2]]
        blocks = [launch for launch in launches if launch is not None and launch.block_warps]
        launches += [replace(launch, block_warps=18 - launch.block_warps) for launch in blocks]
        if num_pairs <= self.CLUSTERS_MAX_PAIRS:
            launches += self.CLUSTERS
        return list(dict.fromkeys(map(_launch_name, [*launches, *self._more, None])))

    def forced(self, kernel: str) -> DecodeChoices:
        """See `Operator`."""
        return DecodeChoices(((INF, _launch(kernel)),))

    def runs(self, batch: int) -> str:
        """See `Operator`."""
        num_heads, num_kv_heads = self.shape
        width = (num_heads + 2 * num_kv_heads) * self._cache.shape[3]
        qkv_RX = self._cache.new_empty(batch, width)
        return _launch_name(decode_attention.choose(qkv_RX, qkv_RX.dtype, num_heads, self._cache))

    def derive(self, timed: Sequence[Timed]) -> DecodeChoices:
        """See `Operator`."""
        points = [(batch * self.shape[1], _launch(best)) for batch, best in best_points(timed)]
        return DecodeChoices(renewed(self._choices().launches, points))

    def _choices(self) -> DecodeChoices:
        present = self.present
        assert isinstance(present, DecodeChoices)
        return present


def operators_of(
    model: Qwen3MoeForCausalLM,
    k_cache_BLGD: torch.Tensor,
    top_k: int,
    launches: Sequence[Launch] = (),
) -> list[Operator]:
    """Those of the model's first layer with experts, each shape once.

    Args:
        launches: see `DecodeAttention`.
    """
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
        DecodeAttention(num_heads, k_cache_BLGD, launches),
    ]
    return list({op.name: op for op in operators}.values())


def _tile_name(tile: int) -> str:
    return f"tile {tile}"


def _is_tile(kernel: str) -> bool:
    return kernel.startswith("tile ")


def _launch_name(launch: Launch | None) -> str:
    return "paged" if launch is None else launch_name(launch)


def _launch(name: str) -> Launch | None:
    return None if name == "paged" else parse_launch(name)
