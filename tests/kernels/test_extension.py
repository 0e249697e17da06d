"""`moe_engine._C`: it loads everywhere, and every failed CUDA call is named."""

from __future__ import annotations

import pytest
import torch

from moe_engine.ops.expert_counts import expert_token_counts

_C = pytest.importorskip("moe_engine._C", reason="moe_engine._C is not built")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


@without_gpu
def test_without_a_gpu_there_are_no_devices_and_calls_say_so() -> None:
    assert _C.device_count() == 0
    with pytest.raises(RuntimeError, match=r"cudaGetDeviceProperties.*no NVIDIA GPU"):
        _C.device_properties(0)
    with pytest.raises(RuntimeError, match=r"cudaDeviceCanAccessPeer.*no NVIDIA GPU"):
        _C.device_link(0, 1)
    with pytest.raises(RuntimeError, match=r"cudaMemsetAsync.*no NVIDIA GPU"):
        _C.expert_token_counts(
            topk_ids=0, ids_are_int64=True, num_tokens=0, top_k=1, num_experts=1, counts=0, stream=0
        )


def test_a_device_has_no_link_to_itself() -> None:
    with pytest.raises(ValueError, match="two different devices"):
        _C.device_link(1, 1)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_sizes"),
    [
        (32, 4, 128, {8, 16, 32, 64, 128, 256, 384, 512}),
        (5, 5, 128, {8, 16, 32, 64, 128, 256, 384, 512}),
        (9, 2, 128, set()),
        (32, 4, 64, set()),
        (32, 4, 256, set()),
    ],
)
def test_sizes_that_prefill_attention_takes(
    num_heads: int, num_kv_heads: int, head_dim: int, block_sizes: set[int]
) -> None:
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    taken = {size for size in range(1, 513) if _C.prefill_attention_fits(**heads, block_size=size)}
    assert taken == block_sizes


@needs_gpu
def test_device_properties_are_those_that_torch_reports() -> None:
    assert _C.device_count() == torch.cuda.device_count()
    ours = _C.device_properties(0)
    theirs = torch.cuda.get_device_properties(0)
    assert ours["name"] == theirs.name
    assert ours["num_sms"] == theirs.multi_processor_count
    assert ours["compute_capability"] == (theirs.major, theirs.minor)
    assert ours["memory_bytes"] == theirs.total_memory
    assert ours["l2_bytes"] == theirs.L2_cache_size
    assert isinstance(ours["multicast"], bool)


@needs_gpu
def test_an_unknown_device_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match=r"cudaGetDeviceProperties.*cudaErrorInvalidDevice"):
        _C.device_properties(torch.cuda.device_count())
    # Nor is a launch that follows blamed for it.
    assert expert_token_counts(torch.tensor([[0]]).cuda(), 1).tolist() == [1]


@needs_two_gpus
def test_peer_access_is_what_torch_reports() -> None:
    link = _C.device_link(0, 1)
    assert link["peer_access"] == torch.cuda.can_device_access_peer(0, 1)
    assert link["performance_rank"] >= 0
