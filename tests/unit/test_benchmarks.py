"""The benchmarks' arithmetic, and the scripts from end to end on the demo model."""

import itertools
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_engine, bench_serving, ceilings, fake_core, step_timeline
from benchmarks.bench_engine import (
    describe_memory,
    engine_options,
    parse_arguments,
    planned_and_used,
)
from benchmarks.bench_serving import latencies, round_seconds
from benchmarks.decode_floor import expected_experts_hit, slope, step_bytes
from benchmarks.driver import Run, percentile, random_prompts, run_batch, run_streams
from benchmarks.gpu_state import triton_cache
from benchmarks.options import MODELS, find_model, launch_list, launch_name
from benchmarks.peer import Peer
from benchmarks.plot_timeline import draw_timeline, kernel_colors, middle_window
from benchmarks.step_timeline import (
    Kernel,
    device_kernels,
    median_step,
    own_us,
    short_name,
    span_us,
    summarize,
)
from benchmarks.stream_client import Stream
from benchmarks.synthetic_tokenizer import write_tokenizer
from moe_engine import MoEEngine
from moe_engine.config import EngineConfig, ModelConfig
from moe_engine.config.flat import build_config
from moe_engine.engine import launcher
from moe_engine.engine.memory import weight_bytes
from moe_engine.ops.tuning import Launch
from moe_engine.text.tokenizer import Tokenizer
from moe_engine.types.messages import MemoryLedger

QWEN3_30B = ModelConfig.from_directory(MODELS / "qwen3-30b-a3b")
EVEN = [8 / 128] * 128


def test_the_committed_model_has_the_published_size():
    assert weight_bytes(QWEN3_30B, EngineConfig(), torch.bfloat16) == 61_064_245_248


def test_a_ranks_share_of_the_large_model_fits_a_gpu_and_has_a_quarter_of_its_heads():
    share = ModelConfig.from_directory(find_model("qwen3-235b-a22b-tp4"))
    whole = {"num_attention_heads": 64, "num_key_value_heads": 4, "vocab_size": 151936}
    assert {name: 4 * getattr(share, name) for name in whole} == whole
    assert (share.hidden_size, share.moe_intermediate_size, share.num_experts) == (4096, 1536, 128)
    assert 35e9 < weight_bytes(share, EngineConfig(), torch.bfloat16) < 45e9


def test_launches_of_decode_attention_are_read_from_the_command_line():
    launches = launch_list("0:8:2048,12:1:32")
    assert launches == [
        Launch(block_warps=0, max_shares=8, min_tokens=2048),
        Launch(block_warps=12, max_shares=1, min_tokens=32),
    ]
    assert [launch_name(launch) for launch in launches] == ["0:8:2048", "12:1:32"]
    with pytest.raises(ValueError, match="invalid literal"):
        launch_list("12:one:32")


def test_every_expert_is_hit_once_the_batch_is_large():
    assert expected_experts_hit(EVEN, 1) == pytest.approx(8)
    assert expected_experts_hit(EVEN, 64) == pytest.approx(128 * (1 - (15 / 16) ** 64))
    assert expected_experts_hit(EVEN, 10**6) == pytest.approx(128)
    assert expected_experts_hit([1.0, 1.0, 0.0], 5) == 2


def test_expected_hits_are_those_of_random_routing():
    torch.manual_seed(0)
    hits = [len(torch.rand(8, 128).topk(8, dim=1).indices.unique().flatten()) for _ in range(400)]
    assert sum(hits) / 400 == pytest.approx(expected_experts_hit(EVEN, 8), rel=0.01)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_step_that_hits_everything_reads_all_weights_but_the_embedding(is_tied):
    model = replace(QWEN3_30B, tie_word_embeddings=is_tied)
    needed = step_bytes(model, 10**6, 0, EVEN, 2)
    rows = 10**6 * 2048 * 2
    # What the published model has, whose embedding is not its output head.
    assert needed.experts + needed.dense - rows == pytest.approx(61_064_245_248 - 151936 * 2048 * 2)
    assert needed.kv == 0


@pytest.mark.parametrize(("batch", "floor_ms"), [(1, 1.43), (8, 6.1), (64, 14.9), (256, 18.2)])
def test_floors_are_those_worked_out_by_hand_at_4300_gb_per_s(batch, floor_ms):
    needed = step_bytes(QWEN3_30B, batch, 512 + 193, EVEN, 2)
    assert needed.total / 4.3e12 * 1e3 == pytest.approx(floor_ms, rel=0.01)


def test_layers_without_experts_count_as_dense():
    model = ModelConfig.from_dict(
        {"model_type": "qwen3_moe", "num_hidden_layers": 2, "mlp_only_layers": [0]}
    )
    both = ModelConfig.from_dict({"model_type": "qwen3_moe", "num_hidden_layers": 2})
    fewer, more = (step_bytes(m, 1, 0, EVEN, 1) for m in (model, both))
    assert fewer.experts == more.experts / 2
    assert fewer.dense == more.dense - 128 * 2048 + 3 * 2048 * 6144


def test_what_two_runs_have_in_common_cancels():
    assert slope((129, 0.3 + 129 * 0.01), (257, 0.3 + 257 * 0.01)) == pytest.approx(0.01)


def test_steps_count_only_while_the_whole_batch_decodes():
    run = Run(9.0, [[1.0, 2.0, 3.0, 4.0, 5.0], [2.5, 3.5, 5.0, 7.0]], [])
    assert run.step_seconds() == [1.0, 1.5]
    assert Run(1.0, [[1.0], [2.0]], []).step_seconds() == []


def test_distinct_tokens_are_counted_step_by_step() -> None:
    run = Run(1.0, [], [(1, 2, 3), (1, 5, 3), (7, 2, 3), (8, 9, 3)])
    assert run.share_of_distinct_tokens() == pytest.approx((3 / 4 + 3 / 4 + 1 / 4) / 3)


def test_a_hiccup_does_not_change_the_rate_of_prefill(monkeypatch):
    bench = object.__new__(bench_engine.EngineBench)
    bench._arguments = SimpleNamespace(input=16, repetitions=1)
    hiccups = {1: iter([0.0, 0.0, 0.9, 0.0, 0.9, 0.0, 0.0] * 2), 8: iter([0.9, 0.0, 0.0] * 2)}

    def timed(batch, num_input, num_output):
        steps = batch * num_input // 64
        return Run(0.25 + 0.5 * steps + next(hiccups[steps]), [], [])

    monkeypatch.setattr(bench, "_timed", timed, raising=False)
    for row, shape in zip(bench.prefill(64), ("4x16", "1x64"), strict=True):
        assert row["shape"] == shape
        assert row["tok_per_s"] == pytest.approx(64 / 0.5)
        assert max(row["seconds"]["1"]) > 1.5, "all repetitions are saved"


def test_percentiles_interpolate_and_do_without_values():
    assert percentile([float(n) for n in range(101)], 0.99) == pytest.approx(99)
    assert percentile([3.0], 0.5) == 3.0
    assert math.isnan(percentile([], 0.5))


def test_prompts_depend_on_their_seed_alone():
    first = random_prompts(3, 5, 100, seed=1)
    assert first == random_prompts(3, 5, 100, seed=1) != random_prompts(3, 5, 100, seed=2)
    assert all(len(p) == 5 and max(p) < 100 for p in first)


def test_the_gpu_run_has_a_valid_configuration():
    config = MODELS.parents[1] / "configs" / "qwen3-30b-a3b-1gpu.yaml"
    arguments = parse_arguments(["--config", str(config), "--set", "pipeline_depth=2"])
    options = engine_options(arguments)
    engine, _ = build_config(options)
    assert engine.model == str(MODELS / "qwen3-30b-a3b")
    assert engine.scheduler.max_num_batched_tokens == 8192
    assert engine.scheduler.max_num_seqs == 256
    assert engine.scheduler.pipeline_depth == 2
    assert find_model(None) is None


def test_the_engine_benchmark_runs_on_the_demo(monkeypatch, tmp_path):
    output = tmp_path / "engine.json"
    config = MODELS.parents[1] / "configs" / "demo-cpu.yaml"
    command = f"bench --config {config} --load-format auto --batches 1,3 --input 16 --output 8"
    command += f" --prefill-tokens 64 --repetitions 1 --check --json {output}"
    figures = Peer("other 1", "a CPU", "2026-01-03", 16, 9.0, {"1": 4.0}, {"1x64": 70.0}, 0.0)
    peer = tmp_path / "peer.json"
    peer.write_text(json.dumps(figures.to_json()))
    command += f" --peer {peer} --peer {peer}"
    monkeypatch.setattr(sys, "argv", command.split())
    bench_engine.main()
    result = json.loads(output.read_text())
    assert [row["batch"] for row in result["decode"]] == [1, 3]
    machine = result["ceilings"]
    assert machine["read_gb_per_s"] == max(machine["copy_gb_per_s"], machine["sum_gb_per_s"]) > 0.1
    assert all(row["floor_ms"] > 0 and row["interval_ms"]["p50"] > 0 for row in result["decode"])
    assert [row["shape"] for row in result["prefill"]] == ["4x16", "1x64"]
    for row in result["prefill"]:
        assert [(n, len(seconds)) for n, seconds in row["seconds"].items()] == [("1", 5), ("8", 3)]
    assert result["check"]["num_equal_together"] == result["check"]["num_equal_mixed"] == 8
    assert 0 < sum(result["engine"]["startup_s"].values()) <= result["start_s"]
    assert result["engine"]["memory"]["weights"] > 0
    assert result["imports_s"] > 0
    assert result["workload"] == {"input": 16, "output": 8, "temperature": 0, "repetitions": 1}
    assert result["peers"] == 2 * [figures.to_json()]
    assert str(MODELS.parents[1]) not in output.read_text()
    assert "memory" not in result, "there is no driver to ask about a CPU's memory"


def test_triton_s_cache_is_empty_until_a_kernel_is_in_it(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert triton_cache() == "empty"
    (tmp_path / ".triton" / "cache").mkdir(parents=True)
    assert triton_cache() == "empty"
    (tmp_path / ".triton" / "cache" / "kernel").mkdir()
    assert triton_cache() == "filled"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    assert triton_cache() == "empty"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.delenv("TRITON_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert triton_cache() == "filled"


def test_the_ledger_is_held_against_what_the_driver_says_is_used():
    ledger = MemoryLedger(
        total=150109880320,
        at_start=552402944,
        weights=61064245248,
        activations=1740636160,
        graphs_reserved=592183296,
        graphs=310378496,
        kv_cache=70899990528,
        free=17034248192,
    )
    memory = planned_and_used(ledger, {"memory.used": "128087"})
    assert memory["planned"] == 134_567_653_376
    assert memory["used"] == 128087 * 1024 * 1024
    assert memory["difference_percent"] == pytest.approx(-0.192, abs=1e-3)
    assert describe_memory(memory) == "memory: planned 125.33 GiB, used 125.08 GiB (-0.19%)"


def test_each_ceiling_is_in_its_unit():
    h200 = {"read_gb_per_s": 4416.9, "copy_gb_per_s": 4225.8, "matmul_tflop_per_s": 791.3}
    rates = {kind: ceilings.rate(h200, kind) for kind in ("read", "copy", "matmul")}
    assert rates == pytest.approx({"read": 4416.9e9, "copy": 4225.8e9, "matmul": 791.3e12})
    assert ceilings.describe({"device": "NVIDIA H200"} | h200) == (
        "NVIDIA H200: reads 4.42 TB/s, copies 4.23 TB/s, multiplies 791 TFLOP/s"
    )


def test_every_token_of_the_synthetic_tokenizer_is_a_text_of_its_own(tmp_path):
    write_tokenizer(tmp_path, 1000)
    tokenizer = Tokenizer.from_directory(tmp_path)
    texts = {tokenizer.token_bytes(token_id) for token_id in range(1000)}
    assert len(texts) == tokenizer.vocab_size == 1000
    assert tokenizer.decode(tokenizer.encode("Grüße, 世界")) == "Grüße, 世界"
    assert tokenizer.decode([999, 500]) == " abml aatg"


def test_stream_latencies_are_taken_between_events():
    streams = [Stream(1.0, [1.5, 1.6, 1.8], 3), Stream(1.25, [2.0], 1)]
    assert round_seconds(streams) == 1.0
    found = latencies([streams])
    assert found["time_to_first_token_ms"]["p50"] == pytest.approx(625)
    assert found["inter_token_ms"]["p50"] == pytest.approx(150)


def test_the_serving_benchmark_runs_against_a_core_without_a_model(monkeypatch, tmp_path):
    output = tmp_path / "serving.json"
    command = (
        "bench --model qwen3-30b-a3b --streams 3 --requests 2 --input 8 --output 12 --repetitions 1"
    )
    command += f" --clients 2 --fake-step-ms 5 --set device=cpu --json {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(launcher, "RANK_MODULE", launcher.RANK_MODULE)
    monkeypatch.setenv(fake_core.STEP_MS_VARIABLE, "")
    bench_serving.main()
    summary = json.loads(output.read_text())["summary"]
    # 3 streams of 24 tokens take 24 steps of 5 ms at least.
    assert 0 < summary["online_tok_per_s"] <= summary["offline_tok_per_s"] <= 3 * 12 / 0.060
    assert summary["inter_token_ms"]["p50"] > 0


def test_streams_that_send_several_requests(monkeypatch, tmp_path):
    output = tmp_path / "serving.json"
    command = "bench --streams 3 --requests 4 --spread 0.5 --input 6 --output 8 --repetitions 1"
    command += f" --clients 2 --set device=cpu --json {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    work = bench_serving.make_work(bench_serving.parse_arguments(), 500)
    assert work == bench_serving.make_work(bench_serving.parse_arguments(), 500)
    assert [len(requests) for requests in work] == [4] * 3
    prompts, nums = zip(*(request for requests in work for request in requests), strict=True)
    assert len(set(map(tuple, prompts))) == 12
    assert {len(prompt) for prompt in prompts} == {6}
    assert len(set(nums)) > 1
    assert set(nums) <= set(range(4, 13))
    bench_serving.main()
    result = json.loads(output.read_text())
    assert result["options"]["max_num_seqs"] == 3
    assert (result["requests"], result["spread"]) == (4, 0.5)
    tokens = result["summary"]["online_tok_per_s"] * result["online_s"][0]
    assert tokens == pytest.approx(sum(nums))


def test_a_stream_sends_its_next_request_when_the_one_before_has_ended():
    streams = [[([1, 2, 3], 5), ([4], 2), ([5, 6], 1)], [([7, 8], 9)]]
    with MoEEngine(device="cpu", max_num_seqs=4) as engine:
        run = run_streams(engine, streams)
        alone = [run_batch(engine, [prompt], size) for prompt, size in itertools.chain(*streams)]
    assert [len(tokens) for tokens in run.token_ids] == [5, 2, 1, 9]
    assert run.token_ids == [tokens for one in alone for tokens in one.token_ids]
    first, second, third, other = run.arrivals
    assert first[-1] < second[0] <= second[-1] < third[0]
    assert other[0] < first[-1], "streams run side by side"


def test_kernel_names_are_cut_to_what_tells_them_apart():
    assert short_name("void at::native::reduce_kernel<512, 1, at::R>(at::R)") == (
        "reduce_kernel<512, 1, R>"
    )
    hidden = (
        "void moe_engine::(anonymous namespace)::gemm<moe_engine::(anonymous namespace)::S<1> >"
    )
    assert short_name(f"{hidden}(CUtensorMap_st, int)") == "gemm<S<1> >"
    assert short_name("_decode_kernel") == "_decode_kernel"
    assert short_name("Memcpy DtoH (Device -> Pinned)") == "Memcpy DtoH "
    assert len(short_name("k<" + "x, " * 99 + "y>")) == 60


def test_a_steps_kernels_are_summed_by_name_and_layer():
    kernels = [Kernel("a", 0.0, 2.0), Kernel("b", 3.0, 1.0), Kernel("a", 5.0, 2.5)]
    found = summarize(8, kernels, num_layers=2)
    assert (found["span_us"], found["busy_us"], found["num_kernels"]) == (7.5, 5.5, 3)
    first = found["by_kernel"][0]
    assert first == {"name": "a", "count": 2, "sum_us": 4.5, "per_layer_us": 2.25}
    early = [Kernel("a", 0.0, 4.0), Kernel("b", 1.0, 5.0), Kernel("c", 2.0, 1.0), Kernel("b", 8, 1)]
    assert own_us(early) == [4.0, 2.0, 0.0, 1.0]
    found = summarize(8, early, num_layers=2)
    assert (found["span_us"], found["busy_us"]) == (9.0, 7.0)
    assert [row["sum_us"] for row in found["by_kernel"]] == [4.0, 3.0, 0.0]
    slow, fast = [Kernel("a", 0.0, 9.0)], [Kernel("a", 0.0, 1.0)]
    assert median_step([slow, kernels, fast]) is kernels
    assert span_us([]) == 0


def test_recorded_steps_draw_their_tokens(monkeypatch, tmp_path):
    prepared = []

    class FakeBench:
        model, num_layers = "m", 2

        def __init__(self, *arguments):
            pass

        def prepare(self, batch, num_input, temperature=0.0):
            prepared.append((batch, num_input, temperature))
            return lambda: None

    output = tmp_path / "timeline.json"
    monkeypatch.setattr(sys, "argv", f"t --batches 1,8 --input 16 --json {output}".split())
    monkeypatch.setattr(step_timeline, "DecodeBench", FakeBench)
    monkeypatch.setattr(step_timeline, "record", lambda step: [Kernel("a", 0.0, 2.0)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(step_timeline, "require_gpu", lambda: None)
    step_timeline.main()
    assert prepared == [(1, 16, 1.0), (8, 16, 1.0)]
    assert json.loads(output.read_text())["temperature"] == 1.0


def test_only_what_ran_on_the_device_is_a_kernel():
    def event(name, start, end, device):
        times = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=times, device_type=device)

    device, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        event("second", 15.0, 16.0, device),
        event("launch", 1.0, 2.0, host),
        event("first", 11.0, 14.0, device),
        event("empty", 12.0, 12.0, device),
    ]
    assert device_kernels(events) == [Kernel("first", 0.0, 3.0), Kernel("second", 4.0, 1.0)]


def test_the_timeline_is_drawn_the_same_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    layer = [("_attention", 4.0), ("a" * 80, 9.0), *((f"small_{n}", 0.5) for n in range(12))]
    kernels, at = [], 0.0
    for name, duration in layer * 6:
        kernels.append(Kernel(name, at, duration))
        at += duration + 0.25
    result = {"num_layers": 6, "steps": [summarize(b, kernels, 6) for b in (1, 8)]}
    first, second = middle_window(result["steps"][0]["kernels"], 6)
    assert second - first == pytest.approx((at - 0.25) / 3)
    colors = kernel_colors(result["steps"])
    assert len(colors) == 10
    assert list(colors)[:2] == [short_name("a" * 80), "_attention"]
    for name in ("one.svg", "two.svg"):
        draw_timeline(result, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert "<!-- attention -->" in (tmp_path / "one.svg").read_text(), "in the legend"
