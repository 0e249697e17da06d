"""On which machines the tests of the kernels for Hopper run, are skipped, and fail."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from moe_engine.ops import hopper
from tests.hopper_device import MULTICAST_VARIABLE, need_hopper, need_hoppers, need_multicast

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


@pytest.mark.parametrize(
    ("asked", "reported", "reason"),
    [(None, True, "MOE_ENGINE_TEST_MULTICAST=1 allows"), ("1", False, "2 GPUs that report")],
)
def test_tests_of_multicast_skip_unless_it_is_reported_and_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    machine: Machine,
    asked: str | None,
    reported: bool,
    reason: str,
) -> None:
    build = ModuleType("build")
    build.device_properties = lambda device: {"multicast": reported}
    machine((9, 0), build)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv(MULTICAST_VARIABLE, raising=False)
    if asked is not None:
        monkeypatch.setenv(MULTICAST_VARIABLE, asked)
    with pytest.raises(pytest.skip.Exception, match=reason):
        need_multicast(2)


def test_tests_of_multicast_run_where_it_is_reported_and_asked_for(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    build = ModuleType("build")
    build.device_properties = lambda device: {"multicast": True}
    machine((9, 0), build)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv(MULTICAST_VARIABLE, "1")
    need_multicast(2)
