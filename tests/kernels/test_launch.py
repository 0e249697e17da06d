"""Launching a kernel, or only compiling it."""

import itertools
import threading
from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")

from moe_engine.kernels import launch
from moe_engine.kernels.launch import compile_only, compiles_only, launch_kernel


class Recorder:
    """Takes the place of a Triton kernel."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append(("run", grid, args, options))

    def warmup(self, *args, grid, **options):
        self.calls.append(("compile", grid, args, options))


def test_kernel_is_launched_with_its_grid_arguments_and_options():
    kernel = Recorder()
    launch_kernel(kernel, (2, 3), "x", BLOCK=4, num_warps=8)
    assert kernel.calls == [("run", (2, 3), ("x",), {"BLOCK": 4, "num_warps": 8})]


def test_kernel_is_only_compiled_inside_compile_only():
    kernel = Recorder()
    with compile_only():
        launch_kernel(kernel, (1,), "x", BLOCK=4)
    launch_kernel(kernel, (1,), "x", BLOCK=4)
    assert [call[0] for call in kernel.calls] == ["compile", "run"]
    assert kernel.calls[0][1:] == kernel.calls[1][1:]


def test_other_threads_go_on_launching():
    seen = []
    with compile_only():
        thread = threading.Thread(target=lambda: seen.append(compiles_only()))
        thread.start()
        thread.join()
        assert compiles_only()
    assert seen == [False]
    assert not compiles_only()


def test_launches_again_after_an_error():
    with pytest.raises(ZeroDivisionError), compile_only():
        _ = 1 / 0
    assert not compiles_only()


@pytest.fixture
def fresh_counters(monkeypatch):
    """No stream has asked yet, and none that asks here is remembered."""
    monkeypatch.setattr(launch, "_slices", defaultdict(itertools.count))
    monkeypatch.setattr(launch, "_stream_counters", launch._stream_counters.__wrapped__)


@pytest.mark.usefixtures("fresh_counters")
def test_each_stream_has_its_own_counters_and_one_too_many_is_refused():
    device = torch.device("cpu")
    counters = [launch._stream_counters(device, stream) for stream in range(launch.NUM_STREAMS)]
    assert len({slice.data_ptr() for slice in counters}) == launch.NUM_STREAMS
    assert all(len(slice) == launch.COUNTERS_PER_STREAM for slice in counters)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="more than 16 streams of cpu"):
            launch._stream_counters(device, launch.NUM_STREAMS)
