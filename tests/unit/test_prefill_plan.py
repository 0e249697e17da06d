"""Which spans go to cuDNN and which to our kernel."""

from __future__ import annotations

import pytest

from moe_engine.ops.prefill_plan import Implementation, PrefillSpan, plan_prefills


def spans(lens: list[tuple[int, int]]) -> list[PrefillSpan]:
    """Spans of (query length, context length), one after the other."""
    made, row = [], 0
    for query_len, context_len in lens:
        made.append(PrefillSpan(row, query_len, context_len))
        row += query_len
    return made


def whole(*prompts: int) -> list[PrefillSpan]:
    return spans([(prompt, prompt) for prompt in prompts])


def summary(planned: list[PrefillSpan], cudnn: bool = True) -> list[tuple[str, int, int]]:
    """(implementation, spans, rows in the call) of each group; the groups cover all spans."""
    groups = plan_prefills(planned, cudnn)
    covered = [group.first + i for group in groups for i in range(group.num_spans)]
    assert covered == list(range(len(planned)))
    assert all(group.reason for group in groups)
    return [(group.implementation.value, group.num_spans, group.padded_len) for group in groups]


def test_nothing_to_plan() -> None:
    assert summary([]) == []


def test_the_docstrings_example() -> None:
    planned = whole(*[512] * 16, 300, 5000)
    assert summary(planned) == [("cudnn", 16, 512), ("triton", 1, 0), ("cudnn", 1, 5120)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (1, ("triton", 1, 0)),
        (1023, ("triton", 1, 0)),
        (1024, ("cudnn", 1, 1024)),
        (1025, ("cudnn", 1, 1280)),
        (8192, ("cudnn", 1, 8192)),
    ],
)
def test_only_long_prompts_are_worth_a_shape(prompt: int, expected: tuple[str, int, int]) -> None:
    assert summary(whole(prompt)) == [expected]


def test_a_server_meets_few_shapes() -> None:
    shapes = {summary(whole(prompt))[0] for prompt in range(1, 8193)}
    assert len(shapes) <= 32


def test_a_context_before_the_span_goes_to_triton() -> None:
    (group,) = plan_prefills(spans([(4096, 8192)]), True)
    assert group.implementation is Implementation.TRITON
    assert group.reason == "context before the span"


def test_without_cudnn_all_goes_to_triton_in_one_launch() -> None:
    planned = [*whole(8192, 3, 512, 512), *spans([(5, 50)])]
    assert summary(planned, cudnn=False) == [("triton", 5, 0)]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([512] * 8, [("cudnn", 8, 512)]),
        ([512] * 7, [("triton", 7, 0)]),
        ([500] * 16, [("triton", 16, 0)]),
        ([128] * 64, [("triton", 64, 0)]),
        ([1100, 1100], [("cudnn", 1, 1280), ("cudnn", 1, 1280)]),
        ([2048, 2048], [("cudnn", 2, 2048)]),
    ],
)
def test_equal_prompts_share_a_call_where_the_shape_may_come_again(
    prompts: list[int], expected: list[tuple[str, int, int]]
) -> None:
    assert summary(whole(*prompts)) == expected


def test_neighbours_that_go_to_triton_share_a_launch_and_keep_their_reasons() -> None:
    planned = [*whole(20, 30), *spans([(40, 90)]), *whole(2000), *whole(7)]
    groups = plan_prefills(planned, True)
    assert [group.num_spans for group in groups] == [3, 1, 1]
    assert "short prompt" in groups[0].reason
    assert "context before" in groups[0].reason
