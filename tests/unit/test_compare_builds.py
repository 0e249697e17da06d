"""The benchmark that compares builds: its command line, its modules, its report. No GPU."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks.compare_builds import load_build, parse_arguments, prompts, report, running
from benchmarks.gpu_timing import in_turns
from moe_engine.ops import hopper


def test_turns_go_forwards_and_backwards() -> None:
    order: list[str] = []

    def call(name: str) -> int:
        order.append(name)
        return len(order)

    returned = in_turns([lambda: call("a"), lambda: call("b"), lambda: call("c")], 3)
    assert "".join(order) == "abccbaabc"
    assert returned == [[1, 6, 7], [2, 5, 8], [3, 4, 9]]
    assert in_turns([], 3) == []


def test_prompts_are_numbers_of_prompts_and_tokens() -> None:
    arguments = parse_arguments(["a.so", "b.so", "--prompts", "1x8192,16x512", "--batches", "8"])
    assert arguments.builds == [Path("a.so"), Path("b.so")]
    assert arguments.prompts == [(1, 8192), (16, 512)]
    assert arguments.batches == [8]


def test_operators_use_a_build_only_inside() -> None:
    build, present = ModuleType("build"), hopper.extension
    with running(build):
        assert hopper.extension(torch.device("cuda", 0)) is build
    assert hopper.extension is present
    with pytest.raises(RuntimeError, match="failed"), running(build):
        raise RuntimeError("failed")
    assert hopper.extension is present


def test_differences_are_from_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    builds = {"old.so": ModuleType("old"), "new.so": ModuleType("new")}
    assert report("batch 8", builds, [8.0, 7.6]) == {
        "case": "batch 8",
        "ms": {"old.so": 8.0, "new.so": 7.6},
    }
    first, second = capsys.readouterr().out.splitlines()
    assert "+0.00%" in first
    assert "-5.00%" in second


def test_each_path_is_a_module_of_its_own(tmp_path: Path) -> None:
    """Else all builds would be the first one, and as fast."""
    spec = importlib.util.find_spec("moe_engine._C")
    if spec is None or spec.origin is None:
        pytest.skip("moe_engine._C is not built")
    paths = [tmp_path / f"build{number}" / Path(spec.origin).name for number in range(2)]
    for path in paths:
        path.parent.mkdir()
        shutil.copy(spec.origin, path)
    first, second = map(load_build, paths)
    assert first is not second
    assert first.__file__ == str(paths[0])
    assert second.__file__ == str(paths[1])
    assert first.CUDA_ARCHS == second.CUDA_ARCHS


def test_prompts_run_by_the_graphs_of_the_build_that_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph holds the kernels of the build that captured it, whichever is there later."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    device, ran = torch.device("cuda"), []
    runner = SimpleNamespace(_mixed_graphs=None)

    def capture() -> None:
        runner._mixed_graphs = f"graphs of {hopper.extension(device)}"

    def prepare(number: int, length: int, temperature: float) -> None:
        ran.append((runner._mixed_graphs, hopper.extension(device)))

    runner.capture_mixed_graphs = capture
    bench = SimpleNamespace(runtime=SimpleNamespace(runner=runner), prepare=prepare)
    result = prompts(bench, {"a.so": "old", "b.so": "new"}, 2, 512)
    assert result["ms"].keys() == {"a.so", "b.so"}
    assert set(ran) == {("graphs of old", "old"), ("graphs of new", "new")}
