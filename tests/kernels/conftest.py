"""Repairs Triton's interpreter (loop bounds under NumPy 2.4, products of bfloat16 tensors), memory
that is not what it happens to be, and choices that no GPU's table changes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_engine.ops import tuning

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patch_lang_tensor_and_index(tensor: Any, scope: Any) -> None:
        """A loop bound is an array of one element, which NumPy 2.4 does not turn into an int."""
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot_of_values(self: Any, a: Any, b: Any, *args: Any) -> Any:
        """bfloat16 is kept as uint16, and the interpreter multiplies the bit patterns."""
        return create_dot(self, widened(a), widened(b), *args)

    def widened(tensor: Any) -> Any:
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor
        bits = tensor.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    interpreter._patch_lang_tensor = patch_lang_tensor_and_index
    interpreter.InterpreterBuilder.create_dot = create_dot_of_values


@pytest.fixture(autouse=True)
def default_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for Hopper are chosen by the defaults, whatever has been measured on this GPU."""
    table: tuning.Table = {}
    monkeypatch.setattr(tuning, "table", lambda device: table)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised tensor holds NaN, or -77, so that what a kernel leaves out shows."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -77)

        return make_poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
