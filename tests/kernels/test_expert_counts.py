"""Tokens per expert: the reference against plain Python, the CUDA kernel against the reference.

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest
import torch

from moe_engine.ops import native
from moe_engine.ops.expert_counts import expert_token_counts
from moe_engine.ops.reference import expert_counts as reference
from tests.hopper_device import on_hopper

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# On Hopper there must be a build.
needs_extension = pytest.mark.skipif(
    importlib.util.find_spec("moe_engine._C") is None and not on_hopper(),
    reason="moe_engine._C is not built",
)

# (T, K, E): nothing, one, odd, Qwen3's, more experts than one block counts, a large batch.
SHAPES = [(0, 8, 128), (1, 1, 1), (7, 3, 5), (64, 8, 128), (33, 2, 10_001), (20_011, 8, 128)]


def random_ids(num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Ids with about a fifth of padding, of several negative values."""
    ids_TK = torch.randint(0, num_experts, (num_tokens, top_k), dtype=dtype)
    padding_TK = torch.randint(-5, 0, (num_tokens, top_k), dtype=dtype)
    return torch.where(torch.rand(num_tokens, top_k) < 0.2, padding_TK, ids_TK)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_counts_match_a_python_counter(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_experts = shape[2]
    ids_TK = random_ids(*shape, dtype)
    counts_E = expert_token_counts(ids_TK, num_experts)
    expected = Counter(ids_TK.flatten().tolist())
    assert counts_E.dtype == torch.int32
    assert counts_E.tolist() == [expected[expert] for expert in range(num_experts)]


@needs_gpu
@needs_extension
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_counts_match_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    ids_TK = random_ids(*shape, dtype)
    device = torch.device("cuda", torch.cuda.current_device())
    assert native.cuda_extension(device) is not None
    counts_E = expert_token_counts(ids_TK.to(device), shape[2])
    torch.testing.assert_close(counts_E.cpu(), reference.expert_token_counts(ids_TK, shape[2]))


@needs_gpu
@needs_extension
def test_cuda_counts_are_exact_when_all_tokens_choose_one_expert() -> None:
    ids_TK = torch.full((100_000, 8), 77, device="cuda")
    counts_E = expert_token_counts(ids_TK, 128)
    assert counts_E[77] == 800_000
    assert counts_E.sum() == 800_000


@needs_gpu
@needs_extension
def test_cuda_leaves_an_id_that_is_too_large_out() -> None:
    ids_TK = torch.tensor([[3, 4], [2**40, 0]], device="cuda")
    assert expert_token_counts(ids_TK, 4).tolist() == [1, 0, 0, 1]


@needs_gpu
@needs_extension
def test_cuda_counts_can_be_captured_in_a_graph() -> None:
    ids_TK = random_ids(64, 8, 128, torch.int64).cuda()
    expert_token_counts(ids_TK, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts_E = expert_token_counts(ids_TK, 128)
    fresh_TK = random_ids(64, 8, 128, torch.int64)
    ids_TK.copy_(fresh_TK)
    graph.replay()
    torch.testing.assert_close(counts_E.cpu(), reference.expert_token_counts(fresh_TK, 128))


@pytest.mark.parametrize(
    ("ids_TK", "num_experts", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), 4, r"int32 or int64 \[T, K\]"),
        (torch.zeros(3, 2), 4, "float32"),
        (torch.zeros(2, 3, dtype=torch.int32).t(), 4, "contiguous"),
        (torch.zeros(3, 2, dtype=torch.int32), 0, "num_experts is 0"),
        (torch.tensor([[0, 4]]), 4, "holds expert 4; there are 4 experts"),
    ],
)
def test_wrong_arguments_are_refused(ids_TK: torch.Tensor, num_experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_token_counts(ids_TK, num_experts)
