"""What the kernels for Hopper, which get addresses, take; and what the operators check for all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_engine.ops import hopper, moe
from moe_engine.ops.linear import AddedOutput, SplitSums, linear, linear_onto, unsummed_linear
from tests.unit.hopper_on_cpu import choose_as_on_hopper, zeros

Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have room for all sizes."""
    choose_as_on_hopper(monkeypatch)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values 2 bytes (of bfloat16) behind a multiple of 16."""
    storage = tensor.new_empty(tensor.numel() + 8)
    first = 1 + (-storage.data_ptr() // tensor.element_size()) % 8
    there = storage[first : first + tensor.numel()].view(tensor.shape)
    assert there.data_ptr() % 16 == tensor.element_size()
    return there.copy_(tensor)


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """Every other element of the last axis of a wider one."""
    wider = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    return wider[..., ::2]


# What no kernel takes of any tensor that it reads whole.
UNFIT: dict[str, Change] = {
    "float32": torch.Tensor.float,
    "float16": torch.Tensor.half,
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "int8": lambda tensor: tensor.to(torch.int8),
    "elsewhere": lambda tensor: tensor.to("meta"),
    "with gaps": with_gaps,
    "shifted": shifted,
}
unfit = pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)


def linear_arguments(num_rows: int) -> dict[str, torch.Tensor]:
    return {"x_RX": zeros(num_rows, 1024), "weight_OX": zeros(64, 1024)}


def expert_arguments() -> dict[str, torch.Tensor]:
    sizes = {"x_RH": (3, 64), "gate_up_EJH": (4, 128, 64), "down_EHI": (4, 64, 64)}
    return {name: zeros(*shape) for name, shape in sizes.items()}


def router_arguments(num_parts: int = 0) -> dict[str, Any]:
    parts = torch.zeros(num_parts, 3, 256)
    return {
        "x": parts if num_parts else zeros(3, 256),
        "residual_RH": zeros(3, 256),
        "norm_weight_H": zeros(256),
        "gate_EH": zeros(8, 256),
        "top_k": 2,
    }


@unfit
@pytest.mark.parametrize("name", ["x_RX", "weight_OX"])
@pytest.mark.parametrize(
    ("takes", "num_rows"), [(hopper.takes_linear, 3), (hopper.takes_split_linear, 30)]
)
@pytest.mark.usefixtures("on_hopper")
def test_linear_layers(
    takes: Callable[..., bool], num_rows: int, name: str, change: Change
) -> None:
    arguments = linear_arguments(num_rows)
    assert takes(**arguments)
    assert not takes(**arguments | {name: change(arguments[name])})


@unfit
@pytest.mark.parametrize("name", ["x_RH", "gate_up_EJH", "down_EHI"])
@pytest.mark.usefixtures("on_hopper")
def test_experts(name: str, change: Change) -> None:
    arguments = expert_arguments()
    assert hopper.takes_experts(**arguments)
    assert not hopper.takes_experts(**arguments | {name: change(arguments[name])})


@unfit
def test_streaming_experts(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    library = SimpleNamespace(streaming_experts_fit=lambda **sizes: True)
    monkeypatch.setattr(hopper, "extension", lambda device: library)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    assert hopper.takes_streaming_experts(2, zeros(4, 64, 64), 3)
    changed_EHI = change(zeros(4, 64, 64))
    if changed_EHI.device.type != "meta":  # of one tensor nothing can be elsewhere
        assert not hopper.takes_streaming_experts(2, changed_EHI, 3)


@unfit
@pytest.mark.parametrize("name", ["residual_RH", "norm_weight_H", "gate_EH"])
@pytest.mark.usefixtures("on_hopper")
def test_norm_and_router(name: str, change: Change) -> None:
    arguments = router_arguments()
    assert hopper.takes_norm_router(**arguments)
    assert not hopper.takes_norm_router(**arguments | {name: change(arguments[name])})


@pytest.mark.parametrize("num_parts", [0, 3])
@pytest.mark.usefixtures("on_hopper")
def test_what_norm_and_router_add(num_parts: int) -> None:
    """It comes whole or in parts, and may have gaps: the launch copies it then."""
    arguments = router_arguments(num_parts)
    x = arguments["x"]
    other_dtype = torch.bfloat16 if num_parts else torch.float32
    assert hopper.takes_norm_router(**arguments)
    assert hopper.takes_norm_router(**arguments | {"x": with_gaps(x)})
    for changed in (x.to(other_dtype), x.half(), x.to("meta"), shifted(x)):
        assert not hopper.takes_norm_router(**arguments | {"x": changed})


@pytest.mark.usefixtures("on_hopper")
def test_rows_of_linear_layers_and_experts_may_lie_apart() -> None:
    apart_RX, apart_RH = zeros(3, 1032)[:, :1024], zeros(3, 72)[:, :64]
    assert hopper.takes_linear(**linear_arguments(3) | {"x_RX": apart_RX})
    assert hopper.takes_experts(**expert_arguments() | {"x_RH": apart_RH})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear_layers_need_one_dtype_and_matrices(dtype: torch.dtype) -> None:
    x_TX, weight_OX = torch.ones(3, 8, dtype=dtype), torch.ones(5, 8, dtype=dtype)
    residual_TO = torch.ones(3, 5, dtype=dtype)
    for layer in (linear, unsummed_linear, lambda x, weight: linear_onto(x, weight, residual_TO)):
        assert torch.equal(layer(x_TX, weight_OX), 8 * residual_TO)
        for x, weight in ((x_TX.half(), weight_OX), (x_TX[0], weight_OX), (x_TX, weight_OX[0])):
            with pytest.raises(AssertionError):
                layer(x, weight)


def test_experts_need_weights_of_the_rows_dtype_and_float32_shares() -> None:
    x_RH, gate_up_EJH, down_EHI = expert_arguments().values()
    ids_RK, weights_RK = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    arguments = [x_RH, ids_RK, weights_RK, gate_up_EJH, down_EHI]
    assert moe.summed(moe.expert_ffn(*arguments)).dtype == torch.bfloat16
    floats = [t.float() if t.dtype == torch.bfloat16 else t for t in arguments]
    assert moe.summed(moe.expert_ffn(*floats)).dtype == torch.float32
    for place in (0, 3, 4):
        with pytest.raises(AssertionError):
            moe.expert_ffn(*arguments[:place], floats[place], *arguments[place + 1 :])
    with pytest.raises(AssertionError):
        moe.expert_ffn(x_RH, ids_RK, weights_RK.bfloat16(), gate_up_EJH, down_EHI)


WRONG: dict[str, Any] = {
    "residual_TH": zeros(3, 16).float(),
    "norm_weight_H": zeros(16).float(),
    "router_EH": zeros(8, 16).float(),
    "num_tokens_1": torch.tensor([3]),
    "top_k": 9,
}
WRONG_SHAPES = {
    "residual_TH": zeros(4, 16),
    "norm_weight_H": zeros(1, 16),
    "router_EH": zeros(8, 32),
    "num_tokens_1": torch.zeros(2, dtype=torch.int32),
    "x": zeros(3, 8),
}


@pytest.mark.parametrize("kind", ["whole", "parts", "added"])
@pytest.mark.parametrize(("name", "wrong"), [*WRONG.items(), *WRONG_SHAPES.items()])
def test_norm_and_route_needs_what_fits_together(kind: str, name: str, wrong: Any) -> None:
    x: Any = zeros(3, 16)
    if kind == "parts":
        x = SplitSums(torch.zeros(2, 3, 16), torch.bfloat16)
    elif kind == "added":
        x = AddedOutput(zeros(3, 16))
    arguments = {
        "x": x,
        "residual_TH": zeros(3, 16),
        "norm_weight_H": zeros(16),
        "eps": 1e-6,
        "router_EH": zeros(8, 16),
        "top_k": 2,
        "normalize": True,
        "num_tokens_1": torch.tensor([3], dtype=torch.int32),
    }
    moe.norm_and_route(**arguments)
    if kind == "added" and name == "residual_TH":
        return  # nobody reads it
    with pytest.raises(AssertionError):
        moe.norm_and_route(**arguments | {name: wrong})


@pytest.mark.parametrize(
    "parts",
    [
        SplitSums(zeros(2, 3, 16), torch.bfloat16),
        SplitSums(torch.zeros(2, 4, 16), torch.bfloat16),
        SplitSums(torch.zeros(2, 3, 16), torch.float16),
    ],
)
def test_norm_and_route_needs_float32_parts_of_the_residual(parts: SplitSums) -> None:
    with pytest.raises(AssertionError):
        moe.norm_and_route(parts, zeros(3, 16), zeros(16), 1e-6, zeros(8, 16), 2, True)
