"""The greedy choice: kernel and operator against Python's order of (logit, -id).

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch

from moe_engine.ops.sampling import greedy_tokens
from tests.kernels.triton_device import DEVICE, needs_gpu, needs_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan
# (B, V): nothing, one logit, a block and its neighbours, several segments.
SHAPES = [(0, 5), (1, 1), (3, 2047), (2, 2048), (2, 2049), (3, 20_000)]


def run(logits_BV: torch.Tensor) -> torch.Tensor:
    from moe_engine.kernels import greedy

    return greedy.greedy_tokens(logits_BV.to(DEVICE))


def expected_tokens(logits_BV: torch.Tensor) -> list[int]:
    cleaned_BV = logits_BV.double().masked_fill(logits_BV.isnan(), -INF)
    best_B1 = cleaned_BV.amax(dim=1, keepdim=True) if len(cleaned_BV) else cleaned_BV[:, :1]
    return [int((row == best).nonzero()[0]) for row, best in zip(cleaned_BV, best_B1, strict=True)]


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_programs", [3, 6, 2048])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_lowest_of_the_largest_logits_is_taken(
    shape: tuple[int, int],
    num_programs: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moe_engine.kernels import greedy

    # Of few programs each has several blocks to look through.
    monkeypatch.setattr(greedy, "NUM_PROGRAMS", num_programs)
    # Few distinct values, so that the largest occurs in many places.
    logits_BV = (torch.randn(shape) * 4).round().clamp(max=13).to(dtype)
    tokens_B = run(logits_BV)
    assert tokens_B.dtype == torch.int64
    assert tokens_B.tolist() == expected_tokens(logits_BV)


@needs_triton
@pytest.mark.parametrize("vocab_size", [8, 5000])
@pytest.mark.parametrize(
    ("special", "token"),
    [
        ({3: NAN, 4: 2.0}, 4),
        ({0: NAN, 1: NAN}, 2),
        ({2: -0.0, 5: 0.0}, 2),
        ({2: 0.0, 5: -0.0}, 2),
        ({6: INF, 7: INF}, 6),
        ({7: -1e30}, 7),
    ],
)
def test_special_values(special: dict[int, float], token: int, vocab_size: int) -> None:
    logits_BV = torch.full((1, vocab_size), -INF if token == 7 else -5.0)
    for index, value in special.items():
        logits_BV[0, index] = value
    assert run(logits_BV).tolist() == [token]
    assert greedy_tokens(logits_BV).tolist() == [token]


@needs_triton
@pytest.mark.parametrize("value", [-INF, NAN])
def test_a_row_without_a_choice_gives_token_0(value: float) -> None:
    logits_BV = torch.full((2, 4100), value)
    assert run(logits_BV).tolist() == [0, 0]
    assert greedy_tokens(logits_BV).tolist() == [0, 0]


@needs_triton
def test_rows_of_a_wider_tensor_are_read_in_place() -> None:
    wide = torch.randn(5, 6000)
    logits_BV = wide.to(DEVICE)[:, 100:5100]
    from moe_engine.kernels import greedy

    assert greedy.greedy_tokens(logits_BV).tolist() == expected_tokens(wide[:, 100:5100])


@needs_triton
def test_repeated_calls_find_the_counters_as_they_were() -> None:
    from moe_engine.kernels.launch import arrival_counters

    logits_BV = torch.randn(3, 9000)
    for _ in range(3):
        assert run(logits_BV).tolist() == expected_tokens(logits_BV)
    assert not arrival_counters(torch.empty(0, device=DEVICE).device).any()


@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 8, 64, 100, 256, 1025])
def test_real_sizes(num_rows: int, dtype: torch.dtype) -> None:
    logits_BV = (torch.randn(num_rows, 151_936) * 3).to(dtype)
    # Neighbours in bfloat16 tie often, and every row needs its own answer.
    assert run(logits_BV).tolist() == expected_tokens(logits_BV)


@needs_gpu
def test_a_graph_replays_with_other_logits() -> None:
    logits_BV = torch.zeros(5, 151_936, device=DEVICE, dtype=torch.bfloat16)
    greedy_tokens(logits_BV)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens_B = greedy_tokens(logits_BV)
    for _ in range(3):
        fresh = torch.randn(5, 151_936).bfloat16()
        logits_BV.copy_(fresh)
        graph.replay()
        assert tokens_B.tolist() == expected_tokens(fresh)


@needs_gpu
def test_row_offsets_pass_two_to_the_31() -> None:
    row_stride = 2**30
    storage = torch.empty(2 * row_stride + 3000, dtype=torch.bfloat16, device=DEVICE)
    logits_BV = storage.as_strided((3, 3000), (row_stride, 1))
    fresh = torch.randn(3, 3000).bfloat16()
    logits_BV.copy_(fresh)
    assert greedy_tokens(logits_BV).tolist() == expected_tokens(fresh)
