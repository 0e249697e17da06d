"""Which requests are refused at once, and with which words; how long an output may grow."""

from __future__ import annotations

import pytest

from moe_engine.errors import InvalidRequestError
from moe_engine.types.results import FinishReason
from tests.unit.scheduler_world import World


@pytest.mark.parametrize(
    ("num_prompt_tokens", "params", "num_blocks", "param", "code", "words"),
    [
        (0, {}, 16, "prompt", "empty_prompt", ["empty"]),
        (32, {}, 16, "prompt", "context_length_exceeded", ["32 tokens", "length of 32"]),
        (30, {"max_tokens": 3}, 16, "max_tokens", "context_length_exceeded", ["33", "32", "to 2"]),
        (30, {"min_tokens": 3}, 16, "min_tokens", "context_length_exceeded", ["33", "32", "to 2"]),
        (13, {}, 3, "prompt", "context_length_exceeded", ["4 KV blocks of 4", "has 3"]),
        (
            9,
            {"max_tokens": 5},
            3,
            "max_tokens",
            "context_length_exceeded",
            ["9 prompt tokens + max_tokens 5 - 1 = 13", "4 KV blocks", "has 3", "to 4"],
        ),
    ],
)
def test_requests_that_can_never_fit_are_refused_with_the_arithmetic(
    num_prompt_tokens, params, num_blocks, param, code, words
):
    world = World(num_blocks=num_blocks)
    with pytest.raises(InvalidRequestError) as refusal:
        world.add([1] * num_prompt_tokens, **params)
    assert (refusal.value.param, refusal.value.code, refusal.value.status) == (param, code, 400)
    for word in words:
        assert word in refusal.value.message
    assert not world.scheduler.has_unfinished


@pytest.mark.parametrize(
    ("num_prompt_tokens", "params", "num_blocks"),
    [(31, {}, 16), (30, {"max_tokens": 2}, 16), (12, {}, 3), (9, {"max_tokens": 4}, 3)],
)
def test_requests_that_just_fit_are_served(num_prompt_tokens, params, num_blocks):
    world = World(num_blocks=num_blocks)
    world.add([1] * num_prompt_tokens, **params)
    world.drain()


def test_output_without_max_tokens_ends_where_the_room_ends():
    by_context = World().add([1] * 30)
    assert len(by_context.expected) == 2
    world = World(num_blocks=3)
    client = world.add([1] * 9)
    world.drain()
    assert len(client.token_ids) == 4  # 12 positions with KV, and the last token needs none
    assert client.last.finish_reason is FinishReason.LENGTH


def test_request_id_in_use_is_refused_until_it_has_finished():
    world = World()
    client = world.add([1, 2], max_tokens=1)
    with pytest.raises(InvalidRequestError) as refusal:
        world.scheduler.add(client.request)
    assert refusal.value.code == "duplicate_request_id"
    world.drain()
    world.scheduler.add(client.request)


def test_full_queue_is_refused_with_429():
    world = World(max_waiting=2)
    for _ in range(2):
        world.add([1, 2], max_tokens=1)
    with pytest.raises(InvalidRequestError, match="max_waiting = 2") as refusal:
        world.add([1, 2], max_tokens=1)
    assert (refusal.value.status, refusal.value.code) == (429, "queue_full")
