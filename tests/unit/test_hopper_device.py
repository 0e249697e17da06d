"""On which machines the tests of the kernels for Hopper run, are skipped, and fail."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from moe_engine.ops import hopper
from tests.hopper_device import need_hopper, need_hoppers

Machine = Callable[[tuple[int, int] | None, ModuleType | None], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes a GPU of a compute capability, or none, and a build seem to be there."""

    def pretend(capability: tuple[int, int] | None, build: ModuleType | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(hopper, "extension", lambda device: build)

    return pretend


@pytest.mark.parametrize("capability", [None, (8, 9), (10, 0)])
@pytest.mark.parametrize("build", [None, ModuleType("build")])
def test_other_machines_skip(
    machine: Machine, capability: tuple[int, int] | None, build: ModuleType | None
) -> None:
    machine(capability, build)
    with pytest.raises(pytest.skip.Exception, match=r"compute capability 9\.0"):
        need_hopper()


def test_hopper_fails_without_a_build(machine: Machine) -> None:
    machine((9, 0), None)
    with pytest.raises(pytest.fail.Exception, match=r"moe_engine\._C cannot be imported"):
        need_hopper()


def test_hopper_with_a_build_runs(machine: Machine) -> None:
    machine((9, 0), ModuleType("build"))
    need_hopper()


@pytest.mark.parametrize("number", [0, 1])
def test_tests_of_several_gpus_skip_with_fewer(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, number: int
) -> None:
    machine((9, 0), ModuleType("build"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    with pytest.raises(pytest.skip.Exception, match=rf"needs 2 GPUs .*, not {number}"):
        need_hoppers(2)


def test_tests_of_several_gpus_run_where_there_are_enough(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    machine((9, 0), ModuleType("build"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    need_hoppers(2)
