"""Limits that C++ and Python both state are the same; read from the sources, without a build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_engine.ops import hopper, prefill_attention
from moe_engine.ops.tuning import ExpertChoices, Launch
from tests.kernels.prefill_cases import LISTED_ITEMS
from tests.unit.hopper_on_cpu import choose_as_on_hopper, zeros

CSRC = Path(__file__).parents[2] / "csrc"


def numbers(file: str, pattern: str) -> list[int]:
    """What the group of ``pattern`` matches in a file of csrc/, which must be something."""
    found = [int(number) for number in re.findall(pattern, (CSRC / file).read_text())]
    assert found, f"csrc/{file} has nothing like {pattern}"
    return found


def test_rows_of_the_linear_kernels() -> None:
    streaming = numbers("streaming_linear.cu", r"args\.num_tokens > (\d+)")
    assert streaming == [hopper.LINEAR_MAX_ROWS]
    split = numbers("split_linear.h", r"constexpr int kSplitLinearMaxTokens = (\d+);")
    assert split == [hopper.SPLIT_LINEAR_MAX_ROWS]


def test_experts_of_the_grouped_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    (most,) = numbers("expert_tiles.cuh", r"constexpr int kMaxExperts = (\d+);")
    choose_as_on_hopper(monkeypatch)
    x_RH = zeros(1, 64)
    for number, is_taken in ((most, True), (most + 1, False)):
        gate_up_EJH, down_EHI = zeros(number, 128, 64), zeros(number, 64, 64)
        assert hopper.takes_experts(x_RH, gate_up_EJH, down_EHI) == is_taken


def test_tiles_of_the_grouped_kernels() -> None:
    tiles = ExpertChoices.VALUES["tiles"]
    assert numbers("grouped_experts.cu", r"case (\d+):") == list(tiles)


def test_warps_of_a_block_of_decode_attention() -> None:
    taken = []
    for warps in range(65):
        try:
            Launch(warps, 1, 1)
        except ValueError:
            continue
        taken.append(warps)
    blocks = sorted(numbers("block_decode.cu", r"num_warps == (\d+)"))
    assert taken == [0, *blocks]  # 0 stands for the other kernel
    assert sorted(numbers("block_decode.cu", r"launch_blocks<(\d+)>")) == blocks


def test_launches_of_prefill_attention() -> None:
    rows = numbers("prefill_attention.h", r"constexpr int kPrefillRows = (\d+);")
    assert rows == [prefill_attention.TILE_ROWS]
    listed = numbers("prefill_tiles.cuh", r"constexpr int kListed = (\d+);")
    assert listed == [LISTED_ITEMS]
    steps = numbers("prefill_tiles.cuh", r"constexpr int kTokens = (\d+);")
    assert steps == [prefill_attention.STEP_TOKENS]
