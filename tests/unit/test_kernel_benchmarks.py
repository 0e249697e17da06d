"""The kernel benchmarks check what they time: their references and their checks, on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from benchmarks import (
    attention_tune,
    bench_attention,
    bench_sampling,
    gpu_timing,
    moe_workload,
    small_kernels,
    tune_moe,
)
from benchmarks.moe_workload import Batch, Dims, Layer, check_routing, check_rows
from moe_engine.ops import hopper, linear, moe
from moe_engine.ops.reference import moe as reference
from moe_engine.ops.reference import norm as norm_reference

DIMS = Dims(hidden=64, intermediate=32, num_experts=8, top_k=3)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(moe_workload, "DEVICE", "cpu")
    monkeypatch.setattr(small_kernels, "microseconds", lambda calls: [c() for c in calls] and 2.0)
    monkeypatch.setattr(small_kernels, "ROTATED_BYTES", 1 << 14)


def test_rows_must_be_close_and_finite() -> None:
    expected = torch.randn(5, 64)
    check_rows("right", (1.01 * expected).bfloat16(), expected)
    for wrong in (1.03 * expected, expected.index_fill(0, torch.tensor([3]), float("nan"))):
        with pytest.raises(SystemExit, match="wrong one is wrong"):
            check_rows("wrong one", wrong, expected)


def test_routing_must_be_the_best_experts_once_each_with_their_weights() -> None:
    logits_TE = torch.randn(5, 16)
    ids_TK, weights_TK = reference.route(logits_TE, torch.eye(16), 3, normalize=True)
    check_routing("right", logits_TE, ids_TK, weights_TK)
    twice = torch.cat([ids_TK[:, :1], ids_TK[:, :1], ids_TK[:, 2:]], dim=1)
    for ids, weights in (
        (logits_TE.argsort(dim=1)[:, :3].int(), weights_TK),
        (twice, weights_TK),
        (ids_TK - 100, weights_TK),
        (ids_TK, weights_TK * 1.1),
        (ids_TK, weights_TK * float("nan")),
    ):
        with pytest.raises(SystemExit, match="router is wrong at 5 tokens"):
            check_routing("router", logits_TE, ids, weights)


def test_the_products_references_are_those_of_the_experts() -> None:
    batch = Batch.random(DIMS, Layer.random(DIMS), 21, zipf=True)
    zeros = torch.zeros(63, DIMS.intermediate)
    h_PI, _ = tune_moe.reference_products(batch, zeros)
    _, y_PH = tune_moe.reference_products(batch, h_PI)
    expected_TH = reference.expert_ffn(
        batch.x_TH.float(),
        batch.ids_TK,
        batch.weights_TK,
        batch.layer.gate_up_EJH.float(),
        batch.layer.down_EHI.float(),
    )
    found_TH = reference.sum_choices(y_PH, batch.ids_TK, batch.weights_TK)
    torch.testing.assert_close(found_TH, expected_TH)


@pytest.mark.parametrize("product", ["gate_up", "down"])
def test_a_worker_compiles_with_all_that_a_launch_gives(
    monkeypatch: pytest.MonkeyPatch, product: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    from moe_engine.kernels import expert_ffn

    class Compiler:
        """Stands for a kernel."""

        def warmup(self, *arguments: Any, grid: tuple[int], **options: Any) -> None:
            names = {name for name in parameters if name.isupper()}
            assert names | {"num_warps", "num_stages", "launch_pdl"} == options.keys()
            assert len(arguments) == len(parameters) - len(names)
            compiled.append(options["num_stages"])

    name = f"_{product}_kernel"
    parameters = getattr(expert_ffn, name).arg_names
    compiled: list[int] = []
    monkeypatch.setattr(expert_ffn, name, Compiler())
    monkeypatch.setattr(expert_ffn, "supports_pdl", lambda device: True)
    monkeypatch.setattr(expert_ffn, "_stages_on", lambda device, config, weights: 40 + weights)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    tune_moe._compile((product, expert_ffn.LARGE_CONFIG.gate_up, DIMS))
    assert compiled == [42 if product == "gate_up" else 41], capsys.readouterr().out


class TooLarge(Exception):
    """Stands for what Triton raises."""


def test_what_does_not_fit_is_triton_s_to_say(monkeypatch: Any) -> None:
    pytest.importorskip("triton")
    from triton.runtime.errors import OutOfResources, PTXASError

    assert gpu_timing.errors_of_fit() == (OutOfResources, PTXASError)
    monkeypatch.setitem(sys.modules, "triton.runtime.errors", None)
    assert gpu_timing.errors_of_fit() == ()


def test_only_candidates_that_do_not_fit_are_left_out(monkeypatch: Any) -> None:
    monkeypatch.setattr(attention_tune, "errors_of_fit", lambda: (TooLarge,))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def too_large() -> None:
        raise TooLarge

    def broken() -> None:
        raise ValueError("a mistake in the kernel")

    assert attention_tune._compile([list, too_large, dict]) == [True, False, True]
    with pytest.raises(ValueError, match="a mistake"):
        attention_tune._compile([list, broken])


def test_a_wrong_candidate_ends_the_tuning_before_it_is_timed(monkeypatch: Any) -> None:
    expected, timed = torch.randn(4, 64), []

    def run(index: int, config: str) -> torch.Tensor:
        timed.append((config, index))
        if config == "too large":
            raise TooLarge
        if config == "broken":
            raise RuntimeError("a mistake in the kernel")
        return expected if config == "right" else -expected

    def microseconds(calls: Any) -> float:
        timed.clear()
        for call in calls:
            call()
        return 7.0

    monkeypatch.setattr(tune_moe, "microseconds", microseconds)
    monkeypatch.setattr(tune_moe, "errors_of_fit", lambda: (TooLarge,))
    times = tune_moe.time_candidates("down", run, expected, ["too large", "right"], 2)
    assert times == {"right": 7.0}
    assert timed == [("right", 0), ("right", 1)]
    with pytest.raises(SystemExit, match="down, wrong, is wrong"):
        tune_moe.time_candidates("down", run, expected, ["right", "wrong"], 2)
    assert timed[-1] == ("wrong", 0), "it was timed"
    with pytest.raises(RuntimeError, match="a mistake"):
        tune_moe.time_candidates("down", run, expected, ["right", "broken"], 2)


READING = 1e9
"""Bytes/s of a machine."""


def test_a_time_is_held_against_reading() -> None:
    timed = small_kernels.against_reading(2.0, 1000.0, READING)
    assert timed == pytest.approx({"us": 2.0, "tb_per_s": 5e-4, "share_of_reading": 0.5})
    assert small_kernels.describe(timed) == "2.00 us (50%)"


def test_small_kernels_are_timed_with_the_bytes_that_they_move() -> None:
    row = small_kernels.bench_small(DIMS, 21, zipf=False, reading=READING)
    x, gate, y, chosen = 21 * 64 * 2, 8 * 64 * 2, 63 * 64 * 2, 63 * 8
    num_bytes = {
        "route": x + gate + chosen,
        "group_by_expert": 63 * 8 + 36,
        "sum_choices": y + chosen + x,
        "sum_add_rms_norm": y + chosen + 64 * 2 + 3 * x,
    }
    assert row.pop("tokens") == 21
    for name, timed in row.items():
        assert timed["tb_per_s"] == pytest.approx(num_bytes[name] / 2e-6 / 1e12), name


@pytest.mark.parametrize("name", ["route", "group_by_expert", "sum_choices", "sum_add_rms_norm"])
def test_a_wrong_small_kernel_is_not_timed(name: str, monkeypatch: Any) -> None:
    right = getattr(moe, name)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        if isinstance(result, torch.Tensor):
            return 1.1 * result
        if isinstance(result, tuple):
            return result[0], 1.1 * result[1]
        return moe.ExpertGroups(result.offsets_E1, result.pairs_P.flip(0))

    monkeypatch.setattr(moe, name, wrong)
    monkeypatch.setattr(small_kernels, "microseconds", lambda calls: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=name):
        small_kernels.bench_small(DIMS, 21, zipf=False, reading=READING)


@pytest.fixture
def hopper_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins that compute what the CUDA kernels do."""

    def split_linear(x_RX: torch.Tensor, weight_OX: torch.Tensor) -> torch.Tensor:
        half = x_RX.shape[1] // 2
        return torch.stack(
            [
                x_RX[:, columns].float() @ weight_OX[:, columns].float().t()
                for columns in (slice(half), slice(half, None))
            ]
        )

    def norm_router(x: Any, residual: Any, norm: Any, eps: float, gate: Any, *how: Any) -> Any:
        normed, residual = norm_reference.add_rms_norm(x, residual, norm, eps)
        return normed, residual, *reference.route(normed.float(), gate.float(), *how)

    monkeypatch.setattr(small_kernels, "LINEAR_LAYERS", {64: ((64, 96), (128, 64))})
    monkeypatch.setattr(hopper, "linear", torch.nn.functional.linear)
    monkeypatch.setattr(hopper, "split_linear", split_linear)
    monkeypatch.setattr(hopper, "norm_router", norm_router)
    monkeypatch.setattr(hopper, "takes_linear", lambda x, weight: len(x) <= 16)
    monkeypatch.setattr(hopper, "takes_split_linear", lambda x, weight: 16 < len(x) <= 32)
    monkeypatch.setattr(hopper, "takes_norm_router", lambda x, *others: len(x) <= 8)


@pytest.mark.usefixtures("hopper_on_the_cpu")
def test_linear_layers_are_timed_where_they_are_used(capsys: Any) -> None:
    timed = small_kernels.bench_linear(READING)
    cases = [(row["kernel"], row["rows"], row["in"], row["out"]) for row in timed]
    assert cases == [
        (name, num_rows, *layer)
        for layer in ((64, 96), (128, 64))
        for name, num_rows in [
            *(("streaming_linear", n) for n in (1, 4, 8, 16)),
            *(("split_linear", n) for n in (17, 32)),
        ]
    ]
    num_bytes = 2 * (64 + 64 * 96 + 96)
    assert timed[0]["share_of_reading"] == pytest.approx(num_bytes / 2e-6 / READING)
    assert "split_linear is not used for 64 x 64 to 96" in capsys.readouterr().out


@pytest.mark.usefixtures("hopper_on_the_cpu")
def test_norm_and_router_are_timed_where_they_are_used() -> None:
    timed = small_kernels.bench_norm_router(8, 3, READING)
    assert [row["rows"] for row in timed] == [1, 4, 8]
    num_bytes = 2 * (4 * 64 + 64 + 8 * 64) + 3 * 8
    assert timed[0]["share_of_reading"] == pytest.approx(num_bytes / 2e-6 / READING)


@pytest.mark.usefixtures("hopper_on_the_cpu")
@pytest.mark.parametrize("name", ["linear", "split_linear", "norm_router"])
def test_a_wrong_hopper_kernel_is_not_timed(name: str, monkeypatch: Any) -> None:
    right = getattr(hopper, name)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        is_tensor = isinstance(result, torch.Tensor)
        return 1.1 * result if is_tensor else (*result[:3], result[3].roll(1, dims=1))

    monkeypatch.setattr(hopper, name, wrong)
    is_linear = name != "norm_router"
    arguments = (READING,) if is_linear else (8, 3, READING)
    bench = small_kernels.bench_linear if is_linear else small_kernels.bench_norm_router
    with pytest.raises(SystemExit, match=f"{name}.* is wrong"):
        bench(*arguments)


@pytest.fixture
def few_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks of many rows with as many as a CPU has time for."""
    monkeypatch.setattr(small_kernels, "LINEAR_LAYERS", {64: ((64, 96), (128, 64))})
    monkeypatch.setattr(small_kernels, "VOCAB_SIZE", 500)
    monkeypatch.setattr(small_kernels, "NORM_AND_ROUTE_ROWS", (5, 9))
    monkeypatch.setattr(small_kernels, "LINEAR_ONTO_ROWS", (9,))
    monkeypatch.setattr(small_kernels, "EMBEDDING_ROWS", (1, 9))
    monkeypatch.setattr(small_kernels, "num_rotations", lambda num_bytes: 3)
    monkeypatch.setattr(linear, "adds_in_place", lambda x: True)


@pytest.mark.usefixtures("few_of_many_rows")
def test_norm_and_router_of_many_rows_are_timed_with_and_without_an_addition() -> None:
    timed = small_kernels.bench_norm_and_route(8, 3, READING)
    assert [(row["kernel"], row["rows"]) for row in timed] == [
        *(("norm_and_route", 5), ("add_norm_and_route", 5)),
        *(("norm_and_route", 9), ("add_norm_and_route", 9)),
    ]
    others = 2 * (64 + 8 * 64) + 5 * 3 * 8
    for row, num_rows in zip(timed, (2 * 5, 4 * 5), strict=False):
        num_bytes = num_rows * 64 * 2 + others
        assert row["share_of_reading"] == pytest.approx(num_bytes / 2e-6 / READING)


@pytest.mark.usefixtures("few_of_many_rows")
def test_a_product_that_is_added_is_held_against_reading_and_multiplying(monkeypatch: Any) -> None:
    (row,) = small_kernels.bench_linear_onto(READING, 1e12)
    case = {"kernel": "linear_onto", "hidden": 64, "rows": 9, "in": 128, "out": 64}
    assert case.items() <= row.items()
    num_bytes = 2 * (9 * 128 + 64 * 128 + 2 * 9 * 64)
    assert row["share_of_reading"] == pytest.approx(num_bytes / 2e-6 / READING)
    assert row["share_of_multiplying"] == pytest.approx(2 * 9 * 128 * 64 / 2e-6 / 1e12)
    monkeypatch.setattr(linear, "adds_in_place", lambda x: False)
    assert small_kernels.bench_linear_onto(READING, 1e12) == []


@pytest.mark.usefixtures("few_of_many_rows")
def test_the_embedding_is_timed_with_the_rows_that_it_copies() -> None:
    timed = small_kernels.bench_embedding(READING)
    assert [(row["hidden"], row["rows"]) for row in timed] == [(64, 1), (64, 9)]
    num_bytes = 9 * (2 * 2 * 64 + 8)
    assert timed[1]["share_of_reading"] == pytest.approx(num_bytes / 2e-6 / READING)


@pytest.mark.usefixtures("few_of_many_rows")
def test_a_wrong_kernel_of_many_rows_is_not_timed(monkeypatch: Any) -> None:
    right_norm, right_onto, right_embedding = (
        *(moe.norm_and_route, linear.linear_onto),
        small_kernels.embedding,
    )

    def wrong_norm(*arguments: Any) -> Any:
        normed, *others = right_norm(*arguments)
        return normed.flip(0), *others

    def wrong_onto(*arguments: Any) -> Any:
        return linear.AddedOutput(1.1 * right_onto(*arguments).stream_TO)

    monkeypatch.setattr(small_kernels, "microseconds", lambda calls: pytest.fail("timed"))
    monkeypatch.setattr(moe, "norm_and_route", wrong_norm)
    monkeypatch.setattr(linear, "linear_onto", wrong_onto)
    monkeypatch.setattr(small_kernels, "embedding", lambda *a: 1.1 * right_embedding(*a))
    with pytest.raises(SystemExit, match=r"norm_and_route's norm .* is wrong"):
        small_kernels.bench_norm_and_route(8, 3, READING)
    with pytest.raises(SystemExit, match="linear_onto, 9 x 128 to 64, is wrong"):
        small_kernels.bench_linear_onto(READING, 1e12)
    with pytest.raises(SystemExit, match="embedding of 1 tokens is wrong"):
        small_kernels.bench_embedding(READING)


@pytest.mark.parametrize("number", range(4))
def test_every_output_of_norm_and_router_is_checked(number: int) -> None:
    x_RH, residual_RH = torch.randn(2, 5, 64).bfloat16()
    weight_H, gate_EH = torch.rand(64).bfloat16(), (torch.randn(8, 64) / 8).bfloat16()
    normed, residual = norm_reference.add_rms_norm(x_RH, residual_RH, weight_H, 1e-6)
    found = [normed, residual, *reference.route(normed.float(), gate_EH.float(), 3, True)]
    small_kernels.check_norm_router(x_RH, residual_RH, weight_H, gate_EH, tuple(found))
    found[number] = found[number].flip(0)
    with pytest.raises(SystemExit, match="norm_router"):
        small_kernels.check_norm_router(x_RH, residual_RH, weight_H, gate_EH, tuple(found))


def test_other_libraries_figures_are_of_one_gpu_and_its_heads() -> None:
    peers = bench_attention.read_peers(bench_attention.PEERS, "NVIDIA H200", 32, 4)
    assert peers[("decode", "8 x 576")] == 12.3
    assert peers[("prefill", "1x8192")] == 892.0
    decodes = {f"{batch} x {n}" for batch in bench_attention.BATCHES for n in (576, 2048)}
    assert {case for operation, case in peers if operation == "decode"} == decodes
    prefills = {case for operation, case in peers if operation == "prefill"}
    assert prefills < bench_attention.PREFILLS.keys()
    for other in (("NVIDIA H100", 32, 4), ("NVIDIA H200", 64, 4), ("NVIDIA H200", 32, 8)):
        assert bench_attention.read_peers(bench_attention.PEERS, *other) == {}


@pytest.fixture
def sampling_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits to sample from; every call takes 2 microseconds."""
    monkeypatch.setattr(bench_sampling, "DEVICE", "cpu")
    monkeypatch.setattr(bench_sampling, "VOCAB_SIZE", 2000)
    monkeypatch.setattr(bench_sampling, "num_rotations", lambda num_bytes: 2)
    monkeypatch.setattr(bench_sampling, "launch_seconds", lambda call: 1e-6)
    monkeypatch.setattr(bench_sampling, "seconds_per_call", lambda calls: 2e-6)
    return bench_sampling.make_logits(9, spread=3.0)


def test_sampling_is_held_against_reading_the_logits_once(sampling_on_the_cpu: Any) -> None:
    for row in (
        bench_sampling.measure("mixed", 3.0, sampling_on_the_cpu, READING),
        bench_sampling.measure_argmax(3.0, sampling_on_the_cpu, READING),
    ):
        assert row["share_of_reading"] == pytest.approx(9 * 2000 * 2 / 2e-6 / READING)
        assert "1800.0% of reading" in bench_sampling.describe(row)


def test_wrong_samples_are_not_timed(sampling_on_the_cpu: Any, monkeypatch: Any) -> None:
    for name in ("sample_tokens", "greedy_tokens"):
        monkeypatch.setattr(bench_sampling, name, lambda logits, *_, **__: logits.argmin(dim=1))
    monkeypatch.setattr(bench_sampling, "seconds_per_call", lambda calls: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="row 0"):
        bench_sampling.measure("top_p 0.95", 3.0, sampling_on_the_cpu, READING)
    with pytest.raises(AssertionError, match="row 0"):
        bench_sampling.measure_argmax(3.0, sampling_on_the_cpu, READING)
