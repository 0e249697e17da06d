"""The steps that measure memory: as large as a real one, and without a trace."""

import pytest
import torch

from moe_engine.cache.kv import KVCache
from moe_engine.engine.graphs import capturable_buckets
from moe_engine.engine.profiling import StepProfiler, prefill_batch
from moe_engine.engine.runtime import RankRuntime
from tests.unit.runner_world import RunnerWorld

CPU = torch.device("cpu")


def tiny_cache(num_blocks=1):
    return KVCache(2, num_blocks, 4, 2, 16, torch.float32, CPU)


@pytest.mark.parametrize(
    ("num_tokens", "max_model_len", "lengths"),
    [(1, 10, [1]), (10, 10, [10]), (32, 10, [10, 10, 10, 2]), (31, 10, [1, 10, 10, 10])],
)
def test_prefill_of_a_full_step_reads_one_block_and_writes_nowhere(
    num_tokens, max_model_len, lengths
):
    batch, positions = prefill_batch(num_tokens, max_model_len, tiny_cache(), CPU)
    assert batch.num_tokens == num_tokens
    assert batch.num_decodes == lengths.count(1)
    assert batch.context_lens_S.tolist() == lengths
    assert positions.tolist() == [p for length in lengths for p in range(length)]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert batch.query_starts_S.tolist() == starts
    assert [(s.first_row, s.query_len, s.context_len) for s in batch.prefills] == [
        (start, length, length)
        for start, length in zip(starts, lengths, strict=False)
        if length > 1
    ]
    assert (batch.slots_T == 0).all()
    assert (batch.block_tables_SB == 0).all()
    assert batch.block_tables_SB.shape == (len(lengths), -(-max(lengths) // 4))


def test_largest_steps_run_on_a_cache_of_one_block_and_write_to_its_first_slot(tmp_path):
    runtime = RunnerWorld(tmp_path, max_model_len=20).runtime
    kv = tiny_cache()
    profiler = StepProfiler(
        runtime.config,
        runtime.model_config,
        runtime._model,
        kv,
        runtime.groups,
        runtime.exchange,
        runtime.max_model_len,
        CPU,
    )
    with torch.inference_mode():
        profiler._run_prefill(runtime.config.scheduler.max_num_batched_tokens)
        buckets = capturable_buckets(runtime.config.scheduler.max_num_seqs, profiler._exchange)
        profiler._run_decode(buckets[-1])
    assert buckets[-1] == 9
    for layer in range(2):
        assert not any(part.flatten(0, 1)[1:].any() for part in kv.layer(layer))


# What the runtime decides by itself.


@pytest.mark.parametrize(
    ("device", "configured", "depth"),
    [("cpu", None, 1), ("cuda", None, 2), ("cpu", 2, 2), ("cuda", 1, 1)],
)
def test_steps_overlap_on_a_gpu_unless_told_otherwise(tmp_path, device, configured, depth):
    runtime = RunnerWorld(tmp_path, pipeline_depth=configured).runtime
    runtime.device = torch.device(device)
    assert runtime.pipeline_depth == depth


@pytest.mark.parametrize(
    ("device", "wanted", "has_triton", "expected"),
    [
        ("cuda", True, True, True),
        ("cuda", False, True, False),
        ("cuda", True, False, False),
        ("cpu", True, True, False),
    ],
)
def test_graphs_need_a_gpu_and_compiled_kernels(
    tmp_path, monkeypatch, device, wanted, has_triton, expected
):
    runtime = RunnerWorld(tmp_path, cuda_graphs=wanted).runtime
    runtime.device = torch.device(device)
    monkeypatch.setattr("moe_engine.ops.native.has_triton", lambda: has_triton)
    assert isinstance(runtime, RankRuntime)
    assert runtime.uses_graphs == expected


def test_ledger_of_a_cpu_rank_counts_weights_and_blocks(tmp_path):
    runtime = RunnerWorld(tmp_path).runtime
    parameters = sum(parameter.nbytes for parameter in runtime._model.parameters())
    keys, _ = runtime.runner._kv.layer(0)
    assert runtime.ledger.weights == parameters
    assert runtime.ledger.kv_cache == 2 * 2 * keys.nbytes
    assert runtime.ledger.total == runtime.ledger.activations == runtime.ledger.graphs == 0
    assert runtime.ledger.free > 0
