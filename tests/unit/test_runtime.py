"""What a rank decides before it loads: device, context length, memory at hand."""

import pytest
import torch

from moe_engine.config import EngineConfig, ModelConfig, SchedulerConfig
from moe_engine.engine import runtime
from moe_engine.engine.runtime import LocalPlace, pick_device, pick_dtype, pick_max_model_len
from moe_engine.errors import ConfigError

MODEL = ModelConfig.from_dict({"model_type": "qwen3_moe", "max_position_embeddings": 100})


@pytest.mark.parametrize(
    ("wanted", "num_gpus", "device"),
    [("auto", 0, "cpu"), ("cpu", 4, "cpu"), ("auto", 4, "cuda:3"), ("cuda", 4, "cuda:3")],
)
def test_auto_takes_the_local_ranks_gpu_if_there_is_one(monkeypatch, wanted, num_gpus, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert pick_device(wanted, LocalPlace(3, 4)) == torch.device(device)


@pytest.mark.parametrize(("wanted", "num_gpus"), [("cuda", 0), ("auto", 1), ("cuda", 3)])
def test_fewer_gpus_than_ranks_are_refused_with_both_numbers(monkeypatch, wanted, num_gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ConfigError, match=rf"4 ranks .* has {num_gpus};"):
        pick_device(wanted, LocalPlace(0, 4))


@pytest.mark.parametrize(("wanted", "length"), [(None, 100), (1, 1), (100, 100)])
def test_context_is_the_models_unless_a_shorter_one_is_wanted(wanted, length):
    config = EngineConfig(scheduler=SchedulerConfig(max_model_len=wanted))
    assert pick_max_model_len(config, MODEL) == length


def test_context_beyond_the_models_is_refused():
    config = EngineConfig(scheduler=SchedulerConfig(max_model_len=101))
    with pytest.raises(ConfigError, match=r"max_model_len is 101.* 100 tokens"):
        pick_max_model_len(config, MODEL)


def test_dtype_is_the_checkpoints_on_a_gpu_and_float32_on_a_cpu():
    model = ModelConfig.from_dict({"model_type": "qwen3_moe", "torch_dtype": "bfloat16"})
    assert pick_dtype("auto", model, torch.device("cpu")) is torch.float32
    assert pick_dtype("auto", model, torch.device("cuda", 0)) is torch.bfloat16
    assert pick_dtype("float16", model, torch.device("cpu")) is torch.float16


def test_container_limit_bounds_the_memory_at_hand(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "CONTROL_GROUP", tmp_path / "missing")
    unlimited = runtime.available_host_memory()
    assert unlimited > 0
    monkeypatch.setattr(runtime, "CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 1500\n")
    (tmp_path / "memory.max").write_text("10000\n")
    assert runtime.available_host_memory() == 10000 - 7000 + 1500
    (tmp_path / "memory.max").write_text("max\n")
    assert runtime.available_host_memory() > 10000
