"""What the operators choose on Hopper, seen on a CPU: the kernels take everything and never run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from moe_engine.ops import hopper, moe, tuning


class FakeLibrary:
    """The extension of a GPU whose kernels have room for all sizes."""

    def __getattr__(self, name: str) -> Callable[..., bool]:
        assert "fit" in name, name
        return lambda **sizes: True


def choose_as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> tuning.Table:
    """Make the operators choose as on a GPU whose table, returned, is empty."""
    table = use_empty_table(monkeypatch)
    monkeypatch.setattr(hopper, "extension", lambda device: FakeLibrary())
    monkeypatch.setattr(hopper, "_num_splits", lambda library, weight: weight.shape[1] // 512)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(hopper, "takes_streaming_experts", lambda *arguments: True)
    monkeypatch.setattr(moe, "_runs_triton", lambda x: True)
    return table


def use_empty_table(monkeypatch: pytest.MonkeyPatch) -> tuning.Table:
    """Give every device this table, to fill."""
    table: tuning.Table = {}
    monkeypatch.setattr(tuning, "table", lambda device: table)
    return table


def zeros(*shape: int) -> torch.Tensor:
    """In bfloat16."""
    return torch.zeros(*shape, dtype=torch.bfloat16)
