"""Which kernels are tried, what their times change, and the tuner from end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.decode_bench import DecodeBench
from benchmarks.tune import MAX_ERROR, logits_error, parse_arguments
from benchmarks.tune_limits import Timed
from benchmarks.tune_operators import DecodeAttention, Experts, Linear, NormRouter, Operator
from moe_engine.engine.decode import DecodeStep
from moe_engine.engine.runner import ModelRunner
from moe_engine.ops import tuning
from moe_engine.ops.tuning import INF, DecodeChoices, Launch, NormRouterChoices, pick
from tests.unit.hopper_on_cpu import choose_as_on_hopper, use_empty_table, zeros
from tests.unit.runner_world import MODEL, UncapturedGraphs

BATCHES = (1, 2, 4, 8, 16, 32, 64)


@pytest.fixture
def hopper_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They seem to run on the CPU, by the defaults."""
    choose_as_on_hopper(monkeypatch)


def operators() -> list[Operator]:
    return [
        Experts(zeros(16, 128, 64), zeros(16, 64, 64), 2),
        Linear(zeros(8, 2048)),
        NormRouter(zeros(16, 256), 2),
        DecodeAttention(4, zeros(1, 16, 2, 128)),
    ]


@pytest.mark.usefixtures("hopper_kernels")
def test_today_each_operator_runs_by_the_defaults() -> None:
    batches = (1, 2, 4, 16, 17, 64, 65, 4096)
    found = [[op.runs(batch) for batch in batches] for op in operators()]
    assert found[0] == ["streaming"] * 2 + ["tile 16"] + ["tile 64"] * 4 + ["tile 256"]
    assert found[1] == ["streaming"] * 4 + ["split"] * 2 + ["library"] * 2
    assert found[2] == ["fused"] * 6 + ["separate"] * 2
    assert found[3][:4] == ["0:8:2048"] * 3 + ["12:8:160"]
    assert found[3][-1] == "paged"


@pytest.mark.usefixtures("hopper_kernels")
@pytest.mark.parametrize("batch", [1, 3, 16, 40, 64, 300])
def test_every_kernel_worth_trying_runs_when_it_is_forced(batch: int) -> None:
    for op in operators():
        before, present = op.runs(batch), op.present
        kernels = op.kernels(batch)
        refused = {kernel for kernel in kernels if not op.takes(kernel, batch)}
        assert len(set(kernels)) == len(kernels)
        assert before in kernels
        assert refused <= ({"streaming", "split"} if batch > 16 else set()), op.name
        assert op.runs(batch) == before, "what was chosen before is chosen again"
        assert op.present == present


@pytest.mark.usefixtures("hopper_kernels")
def test_what_is_hopeless_is_not_tried() -> None:
    experts, linear, router, attention = operators()
    assert "streaming" in experts.kernels(4)
    assert "streaming" not in experts.kernels(5)
    assert "triton" in experts.kernels(64)
    assert "triton" not in experts.kernels(65)
    assert "tile 128" not in experts.kernels(64)
    assert "tile 128" in experts.kernels(128)
    assert linear.kernels(4) == ["streaming"]
    assert router.kernels(128) == ["fused", "separate"]
    assert router.kernels(129) == ["separate"]
    # Today's, the ones beside it, those of the other size, clusters; 2 KV heads.
    assert attention.kernels(10) == [
        "12:8:80", "12:8:160", "12:8:320", "6:8:80", "6:8:160", "6:8:320",
        "0:4:2048", "0:8:2048", "paged",
    ]  # fmt: skip
    assert attention.kernels(17)[-1] == "paged"
    assert not any(kernel.startswith("0:") for kernel in attention.kernels(17))


def time_all(op: Operator, ms: Callable[[str, int], float]) -> list[Timed]:
    """Made-up times of everything that the operator takes."""
    return [
        Timed(
            batch,
            512,
            op.runs(batch),
            {kernel: ms(kernel, batch) for kernel in op.kernels(batch) if op.takes(kernel, batch)},
        )
        for batch in BATCHES
    ]


@pytest.mark.usefixtures("hopper_kernels")
def test_nothing_changes_where_all_are_as_fast() -> None:
    for op in operators():
        assert op.derive(time_all(op, lambda kernel, batch: 3.0 + batch)) == op.present


@pytest.mark.usefixtures("hopper_kernels")
def test_tiles_change_where_another_is_faster_and_streaming_is_not() -> None:
    experts = operators()[0]

    def ms(kernel: str, batch: int) -> float:
        return {"streaming": batch, "tile 32": 2.5}.get(kernel, 9.0 if batch <= 32 else 2.0)

    derived = experts.derive(time_all(experts, ms))
    assert derived.kernels == ((2, "streaming"), (INF, "grouped"))
    # 2 pairs of a row and 16 experts: batch 4 is 0.5 pairs of an expert, batch 32 is 4. Up to batch
    # 2 nothing is known of tiles.
    tiles = ((0.25, 16), (4.0, 32), (40, 64), (128, 128), (INF, 256))
    assert derived.tiles == tiles


@pytest.mark.usefixtures("hopper_kernels")
def test_experts_by_triton_leave_the_tiles_as_they_are() -> None:
    experts = operators()[0]

    def ms(kernel: str, batch: int) -> float:
        return {"triton": 1.0 if batch == 16 else 3.0, "streaming": 0.5}.get(kernel, 2.0)

    derived = experts.derive(time_all(experts, ms))
    assert derived.kernels == ((4, "streaming"), (8, "grouped"), (16, "triton"), (INF, "grouped"))
    assert derived.tiles == experts.present.tiles


@pytest.mark.usefixtures("hopper_kernels")
def test_a_linear_layer_may_skip_a_kernel() -> None:
    linear = operators()[1]
    ms = {"streaming": 3.0, "split": 2.0, "library": 1.0}
    derived = linear.derive(time_all(linear, lambda kernel, _: ms[kernel]))
    # Splitting is tried from 5 rows on, the library from 9 on.
    assert derived.kernels == ((4, "streaming"), (8, "split"), (INF, "library"))


@pytest.mark.usefixtures("hopper_kernels")
def test_the_router_is_fused_as_long_as_that_is_faster() -> None:
    router = operators()[2]
    timed = time_all(router, lambda kernel, batch: batch if kernel == "fused" else 40.0)
    assert router.derive(timed).kernels == ((32, "fused"), (INF, "separate"))


@pytest.mark.usefixtures("hopper_kernels")
def test_decode_attention_takes_other_launches_by_rows_times_kv_heads() -> None:
    attention = operators()[3]
    timed = time_all(attention, lambda kernel, batch: 1.0 if kernel == "paged" else 2.0)
    assert attention.derive(timed).launches == ((INF, None),)
    timed = time_all(attention, lambda kernel, batch: 1.0 if kernel == "0:4:2048" else 2.0)
    launches = attention.derive(timed).launches
    # Clusters are tried up to 32 pairs, 16 rows.
    assert launches[0] == (32, Launch(0, 4, 2048))
    assert launches[1:] == tuple(step for step in DecodeChoices().launches if step[0] > 32)


@pytest.mark.usefixtures("hopper_kernels")
def test_more_launches_can_be_tried() -> None:
    more = [Launch(6, 1, 1), Launch(12, 2, 99)]
    attention = DecodeAttention(4, zeros(1, 16, 2, 128), more)
    assert {"6:1:1", "12:2:99"} <= set(attention.kernels(64))
    assert attention.takes("12:2:99", 64)


def test_logits_that_have_nothing_to_do_with_todays_are_far_off() -> None:
    expected_BV = torch.randn(4, 1000)
    near_BV = expected_BV + 0.1 * torch.randn(4, 1000)
    near_BV[0] = torch.randn(1000)  # a single row may differ, by its experts
    assert 0.05 < logits_error(near_BV, expected_BV) < 0.2 < MAX_ERROR
    assert logits_error(torch.randn(4, 1000), expected_BV) > 2 * MAX_ERROR
    assert not logits_error(expected_BV * math.nan, expected_BV) <= MAX_ERROR


class Clock:
    """Stands for CUDA's events: shows the end of steps that take as long as is said."""

    now = 0.0
    step_ms = 1.0

    def __init__(self, enable_timing: bool) -> None:
        self._time = math.nan

    def record(self) -> None:
        Clock.now += Clock.step_ms
        self._time = Clock.now

    def elapsed_time(self, end: Clock) -> float:
        return end._time - self._time


class FakeRouter(NormRouter):
    """Has two kernels even on a CPU; they do not differ but in what `TimedGraphs` says of them."""

    def runs(self, batch: int) -> str:
        assert isinstance(self.present, NormRouterChoices)
        return pick(self.present.kernels, batch)


class TimedGraphs(UncapturedGraphs):
    """Steps of one size that take as many milliseconds as they have rows if fused, else 2.5."""

    def __init__(self, decode: DecodeStep, exchange: Any, size: int, kernel: str) -> None:
        super().__init__(decode, exchange)
        self.buckets = [size]
        self._step_ms = size if kernel == "fused" else 2.5

    def replay(self, size: int) -> torch.Tensor:
        Clock.step_ms = self._step_ms
        return super().replay(size)


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> FakeRouter:
    """The only operator that is tuned."""
    use_empty_table(monkeypatch)
    router = FakeRouter(torch.zeros(8, 32), 2)
    monkeypatch.setattr(tune, "bench_operators", lambda bench, launches: [router])
    return router


@pytest.fixture
def run_tuner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, router: FakeRouter
) -> Callable[[str], dict[str, Any]]:
    """Tunes a small model on the CPU, whose steps are not captured; returns the file."""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(MODEL))

    def capture_decode_graphs(runner: ModelRunner, sizes: list[int]) -> None:
        arguments = runner._model, runner._kv, runner._table, runner._groups, runner._max_num_seqs
        runner._decode = DecodeStep(*arguments)
        [size] = sizes
        runner._graphs = TimedGraphs(runner._decode, runner._exchange, size, router.runs(size))

    monkeypatch.setattr(ModelRunner, "capture_decode_graphs", capture_decode_graphs)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(tune, "gpu_state", lambda: {"driver_version": "1.2"})
    monkeypatch.setattr(tune, "require_gpu", lambda: None)

    def run(more: str = "") -> dict[str, Any]:
        path = tmp_path / "some.json"
        command = f"tune --model {tmp_path}/small --set device=cpu --batches 1,2,3,8 --inputs 6,9"
        monkeypatch.setattr("sys.argv", f"{command} --write {path} {more}".split())
        tune.main()
        return tuning.read_document(path)

    return run


def test_the_tuner_writes_what_it_measured_and_what_follows(
    run_tuner: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    [entry] = run_tuner()["norm_router"]
    assert entry["shape"] == {"hidden": 32, "num_experts": 8}
    assert entry["choices"] == {"kernels": [[2, "fused"], [None, "separate"]]}
    assert entry["measured"] == {
        "run": "small",
        # The longer prompts are for attention alone.
        "steps": [
            {
                "batch": batch,
                "input": 6,
                "present": "fused",
                "step_ms": {"fused": float(batch), "separate": 2.5},
            }
            for batch in (1, 2, 3, 8)
        ],
    }
    written = tuning.table_for("Some GPU", tmp_path)
    expected = NormRouterChoices(((2, "fused"), (INF, "separate")))
    assert written == {(NormRouterChoices, (32, 8)): expected}


def test_a_file_keeps_its_other_entries_and_says_how_it_was_measured(
    run_tuner: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    choices = {"kernels": [[None, "fused"]]}
    other = {"shape": {"hidden": 64, "num_experts": 8}, "choices": choices}
    stale = {"shape": {"hidden": 32, "num_experts": 8}, "choices": choices}
    old = {"device": "Some GPU", "runs": {"other": {}}, "norm_router": [stale, other]}
    (tmp_path / "some.json").write_text(json.dumps(old))
    document = run_tuner()
    assert document["norm_router"][0] == other
    assert [e["choices"] == choices for e in document["norm_router"]] == [True, False]
    assert document["runs"].keys() == {"other", "small"}
    run = document["runs"]["small"]
    assert run["driver"] == "1.2"
    assert run["num_layers"] == MODEL["num_hidden_layers"]
    assert run["command"].startswith("python -m benchmarks.tune --model ")
    assert run["command"].endswith("--set device=cpu --batches 1,2,3,8 --inputs 6,9")


def test_a_file_for_another_gpu_is_refused(
    run_tuner: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "some.json").write_text(json.dumps({"device": "Another GPU"}))
    with pytest.raises(SystemExit, match="is for Another GPU, and this is Some GPU"):
        run_tuner()


def test_the_operators_are_those_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    bench = DecodeBench({"device": "cpu"}, str(tmp_path), [(3, 6)], 8)
    found = tune.bench_operators(bench, [])
    assert [(op.section, op.shape) for op in found] == [
        ("experts", (32, 16, 8, 2)),
        ("linear", (32, (4 + 2 * 2) * 16)),
        ("linear", (4 * 16, 32)),
        ("norm_router", (32, 8)),
        ("decode_attention", (4, 2)),
    ]
    assert [op.runs(3) for op in found] == ["reference", "library", "library", "separate", "paged"]
    assert tune.measure(bench, found, 3, 6, []) == {}, "a CPU has no choice"


def test_a_kernel_with_wrong_logits_is_left_out_and_told_in_the_end(
    run_tuner: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([0.01, 1.4, math.nan, 0.01])
    monkeypatch.setattr(tune, "logits_error", lambda logits, expected: next(errors))
    with pytest.raises(SystemExit) as raised:
        run_tuner()
    assert "norm_router 32x8 by separate at batch 2: logits off by 1.40" in str(raised.value)
    assert "at batch 3: logits off by nan" in str(raised.value)
    [entry] = tuning.read_document(tmp_path / "some.json")["norm_router"]
    assert [step["batch"] for step in entry["measured"]["steps"]] == [1, 8]


def test_a_gpu_without_a_choice_writes_nothing(
    run_tuner: Callable[..., dict[str, Any]], router: FakeRouter, tmp_path: Path
) -> None:
    router.MAX_ROWS = 0
    router.runs = lambda batch: "separate"
    with pytest.raises(SystemExit, match="one kernel for each operator"):
        run_tuner()
    assert not (tmp_path / "some.json").exists()


@pytest.mark.usefixtures("router")
def test_a_step_can_be_repeated(run_tuner: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """With the same tokens each time, and more steps of the batch may follow."""
    bench = DecodeBench({"device": "cpu"}, f"{tmp_path}/small", [(3, 6)], 32)
    step = bench.prepare(3, 6, temperature=1.0)
    step()
    plan = bench.repeatable_step()
    outputs = [bench.runtime.runner.launch(plan).result().tokens for _ in range(3)]
    assert len({token.token_id for token in outputs[0]}) > 1
    assert outputs[0] == outputs[1] == outputs[2]
    graphs = bench.capture(3)
    first_BV, second_BV = (bench.logits(plan, graphs) for _ in range(2))
    assert torch.equal(first_BV, second_BV)
    assert first_BV.shape == (3, MODEL["vocab_size"])
    assert len(bench.repeat(plan, graphs, 5)) == 5
    step()
    bench.prepare(3, 6)
    assert bench.runtime.runner._graphs is None


def test_the_command_line_has_the_batches_around_todays_limits() -> None:
    arguments = parse_arguments(["--config", "c.yaml"])
    assert {4, 8, 16, 24, 32, 64, 96} <= set(arguments.batches)
    assert tune.command(arguments).startswith("python -m benchmarks.tune --config c.yaml --batches")
